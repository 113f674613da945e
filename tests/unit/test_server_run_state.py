"""How a run stands: the last end decides, unless it was begun again."""

from __future__ import annotations

from typing import Any

import pytest

from server.run_state import BY_ORDER, RunState, run_state


def _events(*kinds: str | tuple[str, str]) -> list[dict[str, Any]]:
    """Events in order, one second apart; a pair is a kind and its code."""
    made = []
    server_round = 0
    for time, kind in enumerate(kinds, start=1):
        name, code = kind if isinstance(kind, tuple) else (kind, "")
        event: dict[str, Any] = {"event": name, "time": float(time)}
        if name in ("run-started", "resumed"):
            event["rounds"] = 3
        if name == "round":
            server_round += 1
            event["round"] = server_round
        if code:
            event |= {"code": code, "message": f"because of {code}"}
        made.append(event)
    return made


def _state(*kinds: str | tuple[str, str], held: bool = False) -> RunState:
    return run_state(_events(*kinds), held=held)


def test_a_run_that_nobody_runs_waits() -> None:
    assert _state().kind == "waiting"
    assert _state("requested").kind == "waiting"
    assert _state("requested", "run-started", "round").kind == "waiting"


def test_a_run_whose_lock_is_held_runs() -> None:
    assert _state(held=True).kind == "running"
    assert _state("requested", "run-started", held=True).kind == "running"


@pytest.mark.parametrize("held", [True, False])
def test_the_last_end_decides(held: bool) -> None:
    assert _state("run-started", "finished", held=held).kind == "finished"
    stopped = _state("run-started", ("stopped", "quorum"), held=held)
    assert (stopped.kind, stopped.code, stopped.message) == (
        "stopped",
        "quorum",
        "because of quorum",
    )
    gave_up = _state("run-started", ("stopped", "engine"), ("gave-up", "engine"), held=held)
    assert gave_up.kind == "gave-up"


@pytest.mark.parametrize("again", ["requested", "run-started", "resumed"])
def test_an_end_is_over_when_the_run_is_begun_again(again: str) -> None:
    for end in ("finished", ("stopped", "quorum"), ("gave-up", "engine")):
        state = _state("run-started", end, again)
        assert state.kind == "waiting"
        assert (state.code, state.message) == ("", "")
        assert not state.is_over
        assert _state("run-started", end, again, held=True).kind == "running"


@pytest.mark.parametrize("again", ["run-started", "resumed"])
def test_what_a_person_stopped_only_a_person_begins_again(again: str) -> None:
    """A ServerApp that was still loading when the order came begins a moment later, and is ended."""
    state = _state("requested", ("stopped", BY_ORDER), again)
    assert (state.kind, state.code) == ("stopped", BY_ORDER)
    assert state.is_over
    assert _state("requested", ("stopped", BY_ORDER), again, "requested").kind == "waiting"


@pytest.mark.parametrize("code", ["engine", "disk", "internal"])
def test_trouble_of_machines_is_not_the_end(code: str) -> None:
    assert not _state("run-started", ("stopped", code)).is_over
    assert _state("run-started", ("stopped", code), ("gave-up", "engine")).is_over


@pytest.mark.parametrize("code", ["quorum", "config", "checkpoint", "audit", BY_ORDER])
def test_every_other_stop_is_final(code: str) -> None:
    assert _state("run-started", ("stopped", code)).is_over


def test_an_order_stands_whatever_the_server_app_makes_of_being_stopped() -> None:
    ordered = ("run-started", ("stopped", BY_ORDER))
    assert _state(*ordered, ("stopped", "internal")).code == BY_ORDER
    assert _state(*ordered, "reply", "round").code == BY_ORDER
    # It was at its very end.
    assert _state(*ordered, "finished").kind == "finished"
    # Only an order that still stands.
    assert _state(*ordered, "requested", "resumed", ("stopped", "engine")).code == "engine"


def test_events_that_nobody_here_knows_change_nothing() -> None:
    assert _state("requested", "run-started", "late", "asked-again", held=True).kind == "running"
    assert _state("run-started", "finished", "late").kind == "finished"


def test_rounds_and_times_are_told() -> None:
    state = _state("requested", "run-started", "round", "round", ("stopped", "engine"))
    assert (state.rounds_done, state.rounds) == (2, 3)
    assert (state.requested_at, state.ran_at) == (1.0, 5.0)


def test_what_was_ordered_or_given_up_is_not_a_server_apps_word() -> None:
    assert _state("requested").ran_at == 0.0
    assert _state("requested", "run-started", ("stopped", BY_ORDER)).ran_at == 2.0
    assert _state("requested", "run-started", ("gave-up", "engine"), "requested").ran_at == 2.0
