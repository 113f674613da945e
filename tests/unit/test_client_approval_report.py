"""What a hospital reads before it decides: everything that counts, and nothing that deceives."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from client.approval_report import approval_table, cost_table
from client.approvals import Request, plan_of
from client.cost import RunCost
from common.config import RunConfig

COST = RunCost(
    unit="patient",
    epsilon=2.5,
    delta=1e-6,
    lifetime_epsilon_after=7.25,
    rounds=30,
    steps=1500,
    bytes_down=1_250_000,
    bytes_up=2_500_000,
    hours=0.25,
    hours_measured=False,
    more_ranks=56,
    most_bytes_down=10_000_000,
)


def _request(cost: RunCost = COST, **settings: Any) -> Request:
    changes = {"model.name": "llama", "lora.target-modules": "q_proj,v_proj", **settings}
    plan = plan_of(
        RunConfig.parse(changes),
        run_uid="run-1",
        base_digest="ab" * 32,
        coordinator="cd" * 32,
        max_rank=64,
    )
    return Request(plan, cost, "waiting", asked_at=1_700_000_000)


def _printed(table: Table) -> str:
    text = io.StringIO()
    Console(width=100, file=text, force_terminal=True).print(table)
    return text.getvalue()


def test_all_that_a_run_costs_is_shown() -> None:
    printed = _printed(approval_table(_request(), max_epsilon=8.0))

    for shown in (
        "run-1", "waiting", "cdcdcdcdcdcdcdcd...", "llama", "abababababababab...", "rank 8",
        "q_proj,v_proj", "patient", "2.50 at delta 1e-06", "7.25 of at most 8.00",
        "1,500 in 30 rounds", "1.2 MB", "2.5 MB", "15.0 minutes", "a guess", "what leaves",
    ):  # fmt: skip
        assert shown in printed


def _words(table: Table) -> str:
    """The table's words alone, as if each row were one line."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│┃]", " ", _printed(table)).split())


def test_what_may_come_beside_the_trained_ranks_is_said() -> None:
    assert (
        "and up to 56 ranks more that are not trained (policy.max-rank): up to 10.0 MB down"
    ) in _words(approval_table(_request(), max_epsilon=8.0))

    none_left = replace(COST, more_ranks=0, most_bytes_down=COST.bytes_down)
    assert "frozen" not in _words(cost_table(none_left, max_epsilon=8.0))

    filed_before = replace(COST, more_ranks=None, most_bytes_down=None)
    assert (
        "and up to policy.max-rank in all that are not trained: not counted when it asked"
    ) in _words(cost_table(filed_before, max_epsilon=8.0))


def test_no_protection_and_no_cap_are_said_in_words() -> None:
    unprotected = replace(COST, epsilon=math.inf, lifetime_epsilon_after=math.inf)

    printed = _printed(cost_table(unprotected, max_epsilon=math.inf))

    assert "infinite (no protection)" in printed
    assert "without a cap" in printed


def test_hours_from_earlier_rounds_are_told_from_a_guess() -> None:
    measured = replace(COST, hours=30.0, hours_measured=True)
    quick = replace(COST, hours=1 / 3600)

    assert "about 30.0 hours (from earlier rounds here)" in _printed(
        cost_table(measured, max_epsilon=8.0)
    )
    assert "about 1.0 seconds" in _printed(cost_table(quick, max_epsilon=8.0))


def test_what_comes_from_outside_cannot_paint_over_the_table() -> None:
    """Escape codes could erase the epsilon that a person decides by; rich's own could hide it."""
    asked = "\x1b[2J\x1b[1;1Hq_proj\r[bold]v[/bold]\n"
    printed = _printed(approval_table(_request(**{"lora.target-modules": asked}), max_epsilon=8.0))

    assert "\x1b[2J" not in printed
    assert "\x1b[1;1H" not in printed
    assert "\r" not in printed
    assert "[bold]v[/bold]" in printed


def test_the_table_is_a_hundred_columns_at_most_whatever_was_asked() -> None:
    asked = ",".join(f"module_{i}" for i in range(1000))
    request = _request(**{"lora.target-modules": asked, "model.name": "x" * 500})

    lines = _printed(approval_table(request, max_epsilon=8.0)).splitlines()

    assert len(lines) < 30
    assert all(len(line) <= 100 for line in lines)
