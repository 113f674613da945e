"""The progress bar tells round, replies, loss, epsilon and refusals."""

from __future__ import annotations

import io
from collections.abc import Iterable

from rich.console import Console

from server.history import Event
from server.progress import RunProgress

ROW = {"unit": "record", "delta": 1e-5, "noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 2}


def _round(number: int, loss: float | None, epsilons: Iterable[float | None] = ()) -> Event:
    privacy = {f"site-{n}": {**ROW, "epsilon": epsilon} for n, epsilon in enumerate(epsilons)}
    return {"event": "round", "round": number, "loss": loss, "privacy": privacy}


def _show(events: Iterable[Event], *, sites: int = 2) -> str:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system=None)
    with RunProgress("pilot", console=console, expected_sites=sites) as view:
        for event in events:
            view(event)
    return out.getvalue()


STARTED: Event = {"event": "run-started", "rounds": 3}
ROUND_STARTED: Event = {"event": "round-started", "round": 1, "sites": ["north", "south"]}
REPLY: Event = {"event": "reply", "round": 1, "site": "north"}


def test_round_and_replies_are_shown() -> None:
    shown = _show([STARTED, ROUND_STARTED, REPLY])
    assert "pilot" in shown
    assert "round 1/3  sites 1/2" in shown


def test_replies_are_counted_against_the_sites_that_were_asked() -> None:
    """With federation.fraction below 1 a round asks fewer sites than there are."""
    assert "round 1/3  sites 1/2" in _show([STARTED, ROUND_STARTED, REPLY], sites=4)


def test_loss_and_largest_epsilon_follow_a_merge() -> None:
    shown = _show([STARTED, ROUND_STARTED, REPLY, REPLY, _round(1, 3.14159, [1.5, 2.25])])
    assert "round 1/3  loss 3.142  eps 2.25" in shown


def test_without_privacy_or_evaluation_neither_is_made_up() -> None:
    shown = _show([STARTED, ROUND_STARTED, _round(1, None, [None])])
    assert "round 1/3" in shown
    assert "eps" not in shown
    assert "loss" not in shown


def test_last_loss_stays_in_view_during_the_next_round() -> None:
    second: Event = {**ROUND_STARTED, "round": 2}
    shown = _show([STARTED, ROUND_STARTED, _round(1, 2.5, [1.0]), second, {**REPLY, "round": 2}])
    assert "round 2/3  sites 1/2  loss 2.500  eps 1.00" in shown


def test_refusal_is_printed_with_site_and_reason() -> None:
    refused: Event = {"event": "refused", "round": 1, "site": "north", "reason": "site-policy"}
    assert "round 1: north refused (site-policy)" in _show([STARTED, ROUND_STARTED, refused])


def test_base_loss_and_waiting_are_shown() -> None:
    assert "base loss 5.20" in _show([STARTED, {"event": "base", "loss": 5.2}])
    waiting: Event = {"event": "waiting", "present": 1, "needed": 2}
    assert "waiting for sites (1/2)" in _show([STARTED, waiting])


def test_base_without_an_evaluation_is_no_error() -> None:
    assert "starting" in _show([STARTED, {"event": "base"}])


def test_resumed_run_starts_where_it_was_left() -> None:
    resumed: Event = {"event": "resumed", "round": 2, "rounds": 3}
    shown = _show([resumed, {**ROUND_STARTED, "round": 3}])
    assert "round 3/3  sites 0/2" in shown


def test_unknown_events_are_passed_over() -> None:
    assert "pilot" in _show([{"event": "sites", "sites": ["north"]}, {"event": "finished"}])


def test_a_run_is_called_as_it_is_called() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system=None)
    with RunProgress("study [a] [/b]", console=console, expected_sites=2) as view:
        view(STARTED)
    assert "study [a] [/b] " in out.getvalue()
