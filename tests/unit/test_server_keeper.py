"""The keeper: what is asked for is begun, what died is resumed, what cannot be is given up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

import server.keeper
from common.locks import hold_lock
from server.coordinator import Coordinator
from server.flower_control import ControlError, FlowerControl
from server.history import History, read_events
from server.keeper import Keeper, KeeperTiming, read_submissions
from server.run_folder import RunFolder, run_lock
from server.run_state import BY_ORDER
from tests.unit.coordinator import ask_for_run, write_coordinator

ROOT = Path(__file__).parents[2]
FAST = KeeperTiming(
    backoffs_s=(0.0, 0.0, 0.0, 0.0, 0.0), ask_every_s=0.0, start_s=60.0, load_s=60.0, stopped_s=0.0
)


@dataclass(frozen=True)
class FakeFlower(FlowerControl):
    """Flower that takes everything; `states` is what it says of its runs."""

    asked: list[str] = field(default_factory=list)
    states: dict[str, str] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)

    def submit(self, app_dir: Path, overrides: Path, *, federation: str = "") -> str:
        if self.refusals:
            raise ControlError(self.refusals.pop(0))
        run_id = str(1 + sum(one.startswith("run") for one in self.asked))
        self.asked.append(f"run {run_id} {overrides.stem}")
        self.states[run_id] = "running"
        return run_id

    def status(self, run_id: str) -> tuple[str, str]:
        self.asked.append(f"ls {run_id}")
        return self.states[run_id], "no details"

    def stop(self, run_id: str) -> None:
        self.asked.append(f"stop {run_id}")

    def save_log(self, run_id: str, path: Path) -> None:
        path.write_text("what it printed")


@dataclass
class Clock:
    """The keeper's, that stands still until a test moves it."""

    now_s: float = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("server.keeper.time.monotonic", lambda: clock.now_s)
    return clock


@dataclass
class Office:
    coordinator: Coordinator
    flower: FakeFlower
    run: RunFolder
    keeper: Keeper

    def say(self, event: str, **details: object) -> None:
        """What the ServerApp writes."""
        History(self.run.history).record(event, **details)

    def begin(self) -> None:
        """The keeper submits the run and its ServerApp takes it up."""
        self.keeper.look()
        self.keeper.look()
        with self.running():
            self.say("run-started", rounds=9)
            self.keeper.look()

    @contextmanager
    def running(self) -> Iterator[None]:
        with hold_lock(run_lock(self.run.path)):
            yield

    def submitted(self) -> int:
        return sum(one.startswith("run") for one in self.flower.asked)

    def events(self) -> list[str]:
        return [event["event"] for event in read_events(self.run.history)]


@pytest.fixture
def office(tmp_path: Path) -> Office:
    coordinator = write_coordinator(tmp_path / "coordinator")
    flower = FakeFlower(coordinator.flower_home, "lab", {})
    run = ask_for_run(coordinator, tmp_path / "run")
    return Office(coordinator, flower, run, Keeper(coordinator, flower, timing=FAST))


def test_a_run_that_was_asked_for_is_submitted_once(office: Office) -> None:
    office.keeper.look()
    assert office.flower.asked == [f"run 1 {office.run.run_uid}"]
    for _ in range(3):
        office.keeper.look()
    assert office.submitted() == 1


def test_flower_is_not_asked_while_a_run_goes_or_none_is_left(office: Office) -> None:
    office.begin()
    asked = len(office.flower.asked)
    with office.running():
        for _ in range(5):
            office.keeper.look()
    office.say("finished", folder="")
    for _ in range(5):
        office.keeper.look()
    assert len(office.flower.asked) == asked


def test_a_server_app_that_died_is_resumed_and_what_flower_thinks_of_it_stopped(
    office: Office,
) -> None:
    office.begin()
    office.keeper.look()
    office.keeper.look()
    assert office.submitted() == 2
    stop, again = office.flower.asked[-2:]
    assert stop == "stop 1"
    assert again.startswith("run 2")


@pytest.mark.parametrize("code", ["engine", "disk", "internal"])
def test_a_stop_that_time_mends_is_resumed(office: Office, code: str) -> None:
    office.begin()
    office.say("stopped", code=code, message="the SuperLink was away")
    office.keeper.look()
    said = read_submissions(office.coordinator.keeper_state)[office.run.run_uid]
    assert said.trouble == f"it stopped ({code}): the SuperLink was away"
    office.keeper.look()
    assert office.submitted() == 2


def test_a_full_disk_is_waited_for_as_long_as_it_takes(office: Office) -> None:
    office.begin()
    for tries in range(2, 12):
        office.say("stopped", code="disk", message="it is full")
        office.keeper.look()
        office.keeper.look()
        assert office.submitted() == tries
        office.say("resumed", round=0, rounds=9)
    assert "gave-up" not in office.events()


def test_so_is_one_that_is_too_full_to_say_so(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    office.begin()
    monkeypatch.setattr(server.keeper, "_disk_is_full", lambda folder: True)
    for tries in range(2, 12):
        office.say("sites", sites=[])
        office.keeper.look()
        office.keeper.look()
        assert office.submitted() == tries
    assert "gave-up" not in office.events()


def test_a_clock_that_was_set_back_submits_nothing_twice(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request then seems to be later than what answered it."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 7200)
    for _ in range(5):
        office.keeper.look()
    assert office.submitted() == 1


@pytest.mark.parametrize("code", ["quorum", "config", "checkpoint", BY_ORDER])
def test_any_other_stop_is_left_to_people(office: Office, code: str) -> None:
    office.begin()
    office.say("stopped", code=code, message="too few sites")
    for _ in range(5):
        office.keeper.look()
    assert office.submitted() == 1


def test_five_resumes_without_a_new_round_are_the_end(
    office: Office, caplog: pytest.LogCaptureFixture
) -> None:
    office.begin()
    for tries in range(2, 7):
        office.keeper.look()
        office.keeper.look()
        assert office.submitted() == tries
        office.say("resumed", round=0, rounds=9)
    for _ in range(5):
        office.keeper.look()
    assert office.submitted() == 6
    assert office.events()[-1] == "gave-up"
    last = read_events(office.run.history)[-1]
    assert last["code"] == "engine"
    assert "resumed 5 times in a row without a new round" in last["message"]
    assert "its ServerApp died" in last["message"]
    assert "server run --resume" in last["message"]
    assert "giving up run" in caplog.text


def test_a_new_round_gives_five_more_tries(office: Office) -> None:
    office.begin()
    for tries in range(1, 13):
        office.say("round", round=tries // 4 + 1)
        office.keeper.look()
        office.keeper.look()
        office.say("resumed", round=1, rounds=9)
    assert office.submitted() == 13
    assert "gave-up" not in office.events()


def test_who_resumes_what_was_given_up_has_five_new_tries(office: Office) -> None:
    office.begin()
    for _ in range(20):
        office.say("stopped", code="engine", message="away")
        office.keeper.look()
    assert office.events().count("gave-up") >= 1
    before = office.submitted()
    office.say("requested", resume=True)
    office.keeper.look()
    assert office.submitted() == before + 1
    office.say("resumed", round=0, rounds=9)
    office.keeper.look()
    said = read_submissions(office.coordinator.keeper_state)[office.run.run_uid]
    assert said.resumes == 1


def test_each_resume_waits_longer(office: Office, clock: Clock) -> None:
    keeper = Keeper(office.coordinator, office.flower, timing=replace(FAST, backoffs_s=(5.0, 10.0)))
    office = replace(office, keeper=keeper)
    office.begin()
    for wait_s in (5.0, 10.0):
        office.say("stopped", code="engine", message="away")
        before = office.submitted()
        keeper.look()
        clock.now_s += wait_s - 0.1
        keeper.look()
        assert office.submitted() == before
        clock.now_s += 0.2
        keeper.look()
        assert office.submitted() == before + 1
        office.say("resumed", round=0, rounds=9)


def test_a_run_that_ended_before_it_began_is_submitted_again(office: Office) -> None:
    office.keeper.look()
    office.keeper.look()
    assert office.submitted() == 1
    office.flower.states["1"] = "finished:failed"
    office.keeper.look()
    said = read_submissions(office.coordinator.keeper_state)[office.run.run_uid]
    assert "ended before it began (finished:failed" in said.trouble
    assert (office.coordinator.flower_home / "run-1.log").read_text() == "what it printed"
    office.keeper.look()
    assert office.submitted() == 2


@pytest.mark.parametrize(("state", "patience_s"), [("pending", 180.0), ("running", 1800.0)])
def test_a_run_that_nobody_takes_up_in_time_is_submitted_again(
    office: Office, clock: Clock, state: str, patience_s: float
) -> None:
    timing = replace(FAST, start_s=180.0, load_s=1800.0)
    keeper = Keeper(office.coordinator, office.flower, timing=timing)
    keeper.look()
    office.flower.states["1"] = state
    clock.now_s += patience_s - 0.1
    keeper.look()
    keeper.look()
    assert office.submitted() == 1
    clock.now_s += 0.2
    keeper.look()
    keeper.look()
    assert office.submitted() == 2


def test_a_refusal_is_said_and_tried_again_without_counting(office: Office, clock: Clock) -> None:
    office.flower.refusals.extend(["the SuperLink is away"] * 8)
    timing = replace(FAST, start_s=1e6, load_s=1e6)
    keeper = Keeper(office.coordinator, office.flower, timing=timing)
    for _ in range(12):
        keeper.look()
        said = read_submissions(office.coordinator.keeper_state)[office.run.run_uid]
        if office.flower.refusals:
            assert said.trouble == "Flower did not take it: the SuperLink is away"
        clock.now_s += 61.0
    assert office.submitted() == 1
    assert said.resumes == 0
    assert said.trouble == ""


def test_an_order_to_stop_that_comes_while_a_run_is_submitted_is_kept(office: Office) -> None:
    class Meanwhile(FakeFlower):
        def submit(self, app_dir: Path, overrides: Path, *, federation: str = "") -> str:
            office.say("stopped", code=BY_ORDER, message="by order")
            return super().submit(app_dir, overrides)

    flower = Meanwhile(office.coordinator.flower_home, "lab", {})
    keeper = Keeper(office.coordinator, flower, timing=FAST)
    for _ in range(4):
        keeper.look()
    assert flower.asked == [f"run 1 {office.run.run_uid}", "stop 1"]


def test_a_new_keeper_resumes_at_once_what_the_one_before_submitted(office: Office) -> None:
    office.keeper.look()
    keeper = Keeper(office.coordinator, office.flower, timing=FAST)
    keeper.look()
    keeper.look()
    assert office.submitted() == 2
    said = read_submissions(office.coordinator.keeper_state)[office.run.run_uid]
    assert said.resumes == 0


def test_runs_go_one_at_a_time_in_the_order_that_they_were_asked_for(
    office: Office, tmp_path: Path
) -> None:
    time.sleep(0.01)
    ask_for_run(office.coordinator, tmp_path / "later", uid="0" * 32)
    office.begin()
    submitted = [one for one in office.flower.asked if one.startswith("run")]
    assert [one.split()[-1] for one in submitted] == [office.run.run_uid]
    office.say("finished", folder="")
    office.keeper.look()
    assert office.flower.asked[-1].endswith("0" * 32)


def test_a_run_whose_folder_was_removed_is_let_be(office: Office) -> None:
    (office.run.path / "run.toml").unlink()
    office.keeper.look()
    assert office.flower.asked == []


def test_a_halted_server_app_is_killed(office: Office) -> None:
    code = (
        "import sys, time; from pathlib import Path; from common.locks import hold_lock\n"
        "with hold_lock(Path(sys.argv[1])): print(1, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run_lock(office.run.path))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            office.keeper.look()
            office.keeper.look()
            assert process.poll() is None
            process.send_signal(signal.SIGSTOP)
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                office.keeper.look()
                time.sleep(0.02)
            assert process.returncode == -signal.SIGKILL
        finally:
            process.kill()


def test_what_a_keeper_cannot_write_down_it_still_does(office: Office) -> None:
    office.coordinator.keeper_state.mkdir()
    office.keeper.look()
    assert office.submitted() == 1


def test_a_keeper_that_breaks_says_so(office: Office) -> None:
    class Broken(FakeFlower):
        def submit(self, app_dir: Path, overrides: Path, *, federation: str = "") -> str:
            looked.set()
            raise ZeroDivisionError("a bug")

    looked = threading.Event()

    flower = Broken(office.coordinator.flower_home, "lab", {})
    keeper = Keeper(office.coordinator, flower, timing=replace(FAST, look_every_s=0.01))
    keeper.check()
    keeper.start()
    try:
        assert looked.wait(60)
    finally:
        keeper.stop()
    with pytest.raises(ZeroDivisionError, match="a bug"):
        keeper.check()
