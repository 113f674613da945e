"""Lifetime epsilon of many settings: a bound at once, the exact one when it is ready."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest

from client import epsilon_cache
from client.budget import MAX_EXACT_SETTINGS
from client.epsilon_cache import EpsilonCache
from client.ledger import Ledger, LedgerRow
from common.errors import BudgetError
from common.privacy import EpsilonBounds, GaussianSteps, compose_epsilon, rdp_epsilon

DELTA = 1e-5


def _different(count: int) -> list[GaussianSteps]:
    return [GaussianSteps(4.0 + 0.1 * index, 0.02, 10) for index in range(count)]


def _wait_for_exact_epsilons() -> None:
    for thread in threading.enumerate():
        if thread.name == "epsilon":
            thread.join(60)


def test_twenty_settings_are_exact_at_once() -> None:
    cache, parts = EpsilonCache(), _different(MAX_EXACT_SETTINGS)

    bounds = cache.bounds(parts * 2, delta=DELTA)

    assert bounds.prv is not None
    assert bounds.least == compose_epsilon(parts * 2, delta=DELTA)


def test_more_are_bounded_at_once_and_exact_a_moment_later() -> None:
    cache, parts = EpsilonCache(), _different(MAX_EXACT_SETTINGS + 1)

    first = cache.bounds(parts, delta=DELTA)
    cache.finish(timeout_s=60)
    later = cache.bounds(parts, delta=DELTA)

    assert first == EpsilonBounds(None, rdp_epsilon(parts, delta=DELTA))
    assert later == EpsilonBounds(compose_epsilon(parts, delta=DELTA), first.rdp)
    assert later.least < first.least


def test_what_was_kept_is_for_those_settings_and_that_delta_alone() -> None:
    cache, parts = EpsilonCache(), _different(MAX_EXACT_SETTINGS + 1)
    cache.bounds(parts, delta=DELTA, wait=True)

    assert cache.bounds(parts[::-1], delta=DELTA).prv is not None
    assert cache.bounds(parts, delta=DELTA / 10).prv is None
    assert cache.bounds([*parts, parts[0]], delta=DELTA).prv is None
    cache.finish(timeout_s=60)


def test_who_waits_gets_the_exact_one() -> None:
    parts = _different(MAX_EXACT_SETTINGS + 1)

    bounds = EpsilonCache().bounds(parts, delta=DELTA, wait=True)

    assert bounds.prv == compose_epsilon(parts, delta=DELTA)


def test_without_protection_there_is_nothing_to_compute() -> None:
    cache = EpsilonCache()

    bounds = cache.bounds([*_different(30), GaussianSteps(0.0, 1.0, 1)], delta=DELTA)

    assert bounds == EpsilonBounds(math.inf, math.inf)


def test_one_is_computed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EpsilonCache()
    # The thread waits for the second request.
    asked: list[int] = []

    def slow(parts: tuple[GaussianSteps, ...], *, delta: float) -> EpsilonBounds:
        asked.append(len(parts))
        cache.bounds(_different(MAX_EXACT_SETTINGS + 2), delta=delta)
        return EpsilonBounds(1.0, 2.0)

    monkeypatch.setattr(epsilon_cache, "epsilon_bounds", slow)

    cache.bounds(_different(MAX_EXACT_SETTINGS + 1), delta=DELTA)
    cache.finish(timeout_s=60)

    assert asked == [MAX_EXACT_SETTINGS + 1]
    assert cache.bounds(_different(MAX_EXACT_SETTINGS + 1), delta=DELTA).prv == 1.0
    assert asked == [MAX_EXACT_SETTINGS + 1], "once is enough"


def test_a_long_life_is_refused_by_the_bound_and_let_in_by_the_exact_epsilon(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger, parts = Ledger(path), _different(MAX_EXACT_SETTINGS + 1)
    rdp, exact = rdp_epsilon(parts, delta=DELTA), compose_epsilon(parts, delta=DELTA)
    cap = (rdp + exact) / 2

    def reserve(ledger: Ledger, number: int) -> LedgerRow:
        row = LedgerRow(f"t{number}", f"run-{number}", "notes", "record", 1, parts[number])
        return ledger.reserve(
            row, planned_steps=10, unit="record", delta=DELTA, max_epsilon=cap, accountant="prv"
        )

    for number in range(MAX_EXACT_SETTINGS):
        reserve(ledger, number)
    with pytest.raises(BudgetError, match="by RDP's bound"):
        reserve(ledger, MAX_EXACT_SETTINGS)
    _wait_for_exact_epsilons()

    # Another process has to compute it for itself.
    with pytest.raises(BudgetError, match="by RDP's bound"):
        reserve(Ledger(path), MAX_EXACT_SETTINGS)
    reserve(ledger, MAX_EXACT_SETTINGS)
    bounds = ledger.bounds("notes", unit="record", delta=DELTA)
    assert bounds == EpsilonBounds(exact, rdp)
