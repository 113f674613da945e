"""`server status`: what is so now, by the system's word, and what to do where something is wrong."""

from __future__ import annotations

import io
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from common.canonical import plain_json
from common.locks import hold_lock
from common.supervisor_state import ChildState, SupervisorState
from server.cli import app
from server.coordinator import Coordinator
from server.history import History
from server.keeper import Submission
from server.run_folder import RunFolder, run_lock
from server.run_place import Refusals
from server.run_state import BY_ORDER
from server.status import CoordinatorStatus, NodeReport, coordinator_status
from server.status_tables import status_tables
from tests.unit.coordinator import ask_for_run, write_coordinator


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return write_coordinator(tmp_path / "coordinator")


@pytest.fixture
def run(coordinator: Coordinator, tmp_path: Path) -> RunFolder:
    return ask_for_run(coordinator, tmp_path / "run")


def _text(status: CoordinatorStatus) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    for part in status_tables(status):
        console.print(part)
    return console.export_text()


def _half_a_round(run: RunFolder) -> None:
    history = History(run.history)
    history.record("run-started", run=run.run_uid, rounds=4)
    history.record("approval", site="bern")
    history.record("refused", round=0, site="rome", reason="site-policy")
    history.record("sites", sites=["bern", "oslo", "wien"], nodes={"bern": "7", "oslo": "8"})
    history.record("round-started", round=1, attempt=1, sites=["bern", "oslo", "wien"])
    for site in ("bern", "oslo", "wien"):
        history.record("reply", round=1, site=site)
    privacy = {"bern": {"epsilon": 1.25}, "oslo": {"epsilon": None}}
    history.record("round", round=1, privacy=privacy)
    history.record("round-started", round=2, attempt=1, sites=["bern", "oslo", "wien"])
    history.record("reply", round=2, site="oslo")
    history.record("refused", round=2, site="wien", reason="norm")
    (run.checkpoints / "round-0001").mkdir(parents=True)


def test_a_run_that_goes_is_told_with_its_round_its_sites_and_what_was_spent(
    coordinator: Coordinator, run: RunFolder
) -> None:
    _half_a_round(run)
    with hold_lock(run_lock(run.path)):
        [told] = coordinator_status(coordinator).runs
    assert (told.state, told.round, told.rounds) == ("running", 2, 4)
    assert told.sites == ("bern", "oslo", "wien")
    assert told.replied == ("oslo",)
    assert told.refused == {"rome": "site-policy", "wien": "norm"}
    assert told.awaiting == ()
    assert told.epsilon == {"bern": 1.25, "oslo": None}
    assert told.checkpoint.endswith("round-0001")
    assert told.process == os.getpid()


def test_refusals_are_counted_over_the_whole_run_with_the_last_reason(
    coordinator: Coordinator, run: RunFolder
) -> None:
    _half_a_round(run)
    history = History(run.history)
    history.record("refused", round=2, site="wien", reason="silent")
    history.record("refused", round=2, site="bern", reason="signature")
    history.record("reply", round=2, site="bern")
    with hold_lock(run_lock(run.path)):
        status = coordinator_status(coordinator)
    told = status.runs[0].refusals
    assert told["wien"] == Refusals(2, "silent", 2)
    assert told["bern"] == Refusals(1, "signature", 2)
    text = _text(status)
    assert "wien: silent (2 times in this run)" in text
    assert "bern: not now; once in this run, last signature, round 2" in text


@pytest.mark.parametrize(
    ("days", "said"), [(31, None), (29, "expires in 29 days"), (-1, "has expired")]
)
def test_a_certificate_that_is_about_to_expire_is_said_with_the_command(
    coordinator: Coordinator, days: int, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    until = time.time() + days * 86_400.0 + 60.0
    monkeypatch.setattr("server.status.expires_at", lambda certificate: until)
    status = coordinator_status(coordinator)
    advice = [line for line in status.advice if "certificate " in line]
    assert len(advice) == (said is not None)
    if said is not None:
        assert said in advice[0]
        assert f"consilium server renew {coordinator.folder}" in advice[0]
    coordinator.certificate.write_text("not one")
    monkeypatch.undo()
    assert any("is no certificate" in line for line in coordinator_status(coordinator).advice)


def test_the_tables_say_it_within_a_hundred_columns(
    coordinator: Coordinator, run: RunFolder
) -> None:
    _half_a_round(run)
    with hold_lock(run_lock(run.path)):
        text = _text(coordinator_status(coordinator))
    assert "running, round 2 of 4" in text
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line}
    assert lines["replied"] == "oslo"
    assert lines["asked"] == "bern"
    assert lines["epsilon"] == "bern 1.25, oslo no protection"
    assert "rome: site-policy (once in this run)" in text
    assert lines["refused"] == "wien: norm (once in this run)"
    assert max(map(len, text.splitlines())) <= 100


def test_a_site_that_waits_for_its_hospital_is_named_with_the_command(
    coordinator: Coordinator, run: RunFolder
) -> None:
    history = History(run.history)
    history.record("run-started", run=run.run_uid, rounds=4)
    history.record("approval", site="bern")
    with hold_lock(run_lock(run.path)):
        status = coordinator_status(coordinator)
    assert status.runs[0].awaiting == ("bern",)
    assert any(f"consilium client approve {run.run_uid}" in line for line in status.advice)


@pytest.mark.parametrize(
    ("code", "said"), [("quorum", "stopped (quorum)"), (BY_ORDER, "was stopped by order")]
)
def test_a_run_that_ended_early_says_why_and_how_to_go_on(
    coordinator: Coordinator, run: RunFolder, code: str, said: str
) -> None:
    history = History(run.history)
    history.record("run-started", run=run.run_uid, rounds=4)
    history.record("stopped", code=code, message="too few sites")
    status = coordinator_status(coordinator)
    [told] = status.runs
    assert (told.state, told.code, told.message) == ("stopped", code, "too few sites")
    [advice] = [line for line in status.advice if run.run_uid in line]
    assert said in advice
    assert f"consilium server run RUN.toml {coordinator.folder} --resume" in advice
    assert "too few sites" in _text(status)


def test_why_nothing_runs_a_run_is_told(coordinator: Coordinator, run: RunFolder) -> None:
    trouble = "Flower did not take it: away"
    submission = Submission(at=time.time(), trouble=trouble)
    coordinator.keeper_state.write_text(json.dumps({run.run_uid: asdict(submission)}))
    status = coordinator_status(coordinator)
    assert status.runs[0].trouble == trouble
    assert any(trouble in line for line in status.advice)


def test_only_the_newest_of_the_runs_that_are_over_is_told(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    for number in range(3):
        over = ask_for_run(coordinator, tmp_path / str(number), uid=str(number) * 32)
        History(over.history).record("finished", folder="")
        time.sleep(0.005)
    ask_for_run(coordinator, tmp_path / "new", uid="f" * 32)
    told = [(run.run[0], run.state) for run in coordinator_status(coordinator).runs]
    assert told == [("2", "finished"), ("f", "waiting")]


def test_a_process_is_alive_when_it_is_and_not_when_a_file_says_so(
    coordinator: Coordinator,
) -> None:
    now = time.time()
    children = (
        ChildState("superlink", os.getpid(), "running", now, 2, -9),
        # Nothing has this number: it is above the system's highest.
        ChildState("superexec", 2**22 + 1, "running", now, 0, None),
    )
    SupervisorState(os.getpid(), now, "mark", children).write(coordinator.up_state)
    with hold_lock(coordinator.up_lock):
        status = coordinator_status(coordinator)
    assert status.up == os.getpid()
    assert [one.alive for one in status.processes] == [True, False]
    assert any("superexec is down" in line for line in status.advice)
    assert "signal 9" in _text(status)


def test_a_superlink_that_does_not_answer_leaves_the_nodes_unknown_and_takes_no_time(
    coordinator: Coordinator,
) -> None:
    with hold_lock(coordinator.up_lock):
        started = time.monotonic()
        status = coordinator_status(coordinator)
        assert time.monotonic() - started < 30
    assert status.nodes is None
    assert any("SuperLink does not answer" in line for line in status.advice)
    assert "Nodes: unknown" in _text(status)


def test_nothing_at_all_says_how_to_begin(coordinator: Coordinator) -> None:
    status = coordinator_status(coordinator)
    assert status.advice == (f"nothing runs; start it: consilium server up {coordinator.folder}",)
    text = _text(status)
    assert "down" in text
    assert "Runs: none was asked for" in text


def test_nodes_are_shown_with_their_site_and_when_they_were_heard() -> None:
    nodes = (
        NodeReport("7", "bern", online=True, online_s=4000.0, offline_at=""),
        NodeReport("8", "", online=False, online_s=0.0, offline_at="2026-11-21 10:00:00Z"),
    )
    status = CoordinatorStatus("/srv/c", time.time(), 1, (), nodes, (), None, ())
    text = _text(status)
    assert "now, online for 67 min" in text
    assert "not known yet" in text
    assert "2026-11-21 10:00:00Z" in text


def test_the_json_is_what_was_found(coordinator: Coordinator, run: RunFolder) -> None:
    _half_a_round(run)
    done = CliRunner().invoke(app, ["status", str(coordinator.folder), "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    found = json.loads(json.dumps(plain_json(coordinator_status(coordinator).as_json())))
    assert {**told, "time": 0} == {**found, "time": 0}
    assert told["runs"][0]["refused"] == {"rome": "site-policy", "wien": "norm"}
