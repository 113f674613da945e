"""What the long form is to do, and when it calls a session good; the session itself is run by hand."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import pytest
from rich.console import Console

from tests.chaos.checks import Findings
from tests.chaos.federation import PROCESSES, Kill, OverError, TimeoutExpiredError
from tests.chaos.long import OUTAGES, Report, Result, plan, print_report, run_session
from tests.chaos.points import POINTS

pytestmark = pytest.mark.chaos


def test_a_session_kills_at_every_point_and_every_process_three_times_in_an_order_by_seed() -> None:
    order = plan(times=3, only=(), seed=1)
    assert (len(POINTS), len(PROCESSES), len(OUTAGES)) == (12, 6, 3)
    assert Counter(order) == {
        **dict.fromkeys([*POINTS, *PROCESSES], 3),
        **dict.fromkeys(OUTAGES, 1),
    }
    assert order == plan(times=3, only=(), seed=1) != plan(times=3, only=(), seed=2)
    assert sorted(plan(times=2, only=["pull", "outage-10"], seed=1)) == [
        "outage-10",
        "pull",
        "pull",
    ]


def _report(
    results: Sequence[Result], faults: Sequence[str] = (), left: Sequence[str] = ()
) -> Report:
    findings = Findings({"rounds lost or repeated": faults}, rounds=9, replies=18, charges=19)
    return Report(seed=7, minutes=61.0, results=results, findings=findings, left=left)


GOOD = [Result("pull", 31.0), Result("pull", 52.5), Result("outage-90", 120.0)]


@pytest.mark.parametrize(
    ("report", "is_good"),
    [
        (_report(GOOD), True),
        (_report([*GOOD, Result("push", 120.5)]), False),
        (_report([*GOOD, Result("push", None, "no round came")]), False),
        (_report(GOOD, faults=["history.jsonl commits rounds [1, 3]"]), False),
        (_report(GOOD, left=["flwr-clientapp"]), False),
    ],
)
def test_a_session_is_good_when_all_came_back_in_time_and_nothing_is_wrong_or_left(
    report: Report, is_good: bool
) -> None:
    assert report.is_good is is_good


def test_the_table_has_a_line_for_each_and_the_zeros_below_it() -> None:
    text = io.StringIO()
    results = [*GOOD, Result("push", 3.0), Result("push", None, "no round came")]
    print_report(_report(results, faults=["rounds [1, 3]"]), Console(file=text, width=100))
    lines = [" ".join(line.replace("│", " ").split()) for line in text.getvalue().splitlines()]
    assert "pull ServerApp 2 41.8 52.5" in lines
    assert "push ServerApp 2 3.0 never" in lines
    assert "outage-90 SuperLink 1 120.0 120.0" in lines
    assert "9 rounds, 18 replies, 19 charges" in lines
    assert "1 recoveries above 120 s" in lines
    assert "1 rounds lost or repeated" in lines
    assert "rounds [1, 3]" in lines
    assert "0 processes left" in lines


class _Scripted:
    """A federation whose every recovery is scripted: seconds, or what is raised."""

    def __init__(self, folder: Path) -> None:
        self._script = iter(SCRIPT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def order_run(self) -> None: ...

    def wait_for_round(self) -> float:
        return 0.0

    def kill_at(self, what: str) -> Kill:
        return Kill(what, 1, 0.0, 0)

    def recovered(self, kill: Kill) -> float:
        said = next(self._script)
        if isinstance(said, float):
            return said
        raise said

    def stop(self) -> list[str]:
        return []

    def check(self) -> Findings:
        return Findings({}, 0, 0, 0)


SCRIPT: list[float | Exception] = []


def _session(monkeypatch: pytest.MonkeyPatch, *script: float | Exception) -> Report:
    monkeypatch.setattr("tests.chaos.long.ChaosFederation", _Scripted)
    SCRIPT[:] = script
    silent = Console(file=io.StringIO())
    return run_session(Path(), ["pull"] * len(script), seed=0, console=silent)


def test_a_session_goes_on_after_one_failure_and_ends_after_two_in_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late = TimeoutExpiredError("not within 240 s")
    report = _session(monkeypatch, late, 3.0, late, 4.0, late, late, 5.0)
    assert [result.recovery_s for result in report.results] == [None, 3.0, None, 4.0, None, None]
    assert report.results[0].failure == "not within 240 s"


def test_a_session_whose_run_is_over_ends_with_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    report = _session(monkeypatch, 3.0, OverError("the run is over"), 5.0)
    assert [result.failure for result in report.results] == ["", "the run is over"]
    assert not report.is_good
