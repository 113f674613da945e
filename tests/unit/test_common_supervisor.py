"""The supervisor, with real processes: restarts, patience, hanging, giving up, leaving nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # ships no types
import pytest

from common.errors import EngineError
from common.flower_process import http_answers
from common.process_guard import Guard, guarded_processes
from common.supervisor import ChildSpec, Supervisor, Timing
from common.supervisor_state import ChildState, read_supervisor_state
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
FAST = Timing(
    first_backoff_s=0.1,
    max_backoff_s=0.4,
    settled_s=5.0,
    max_quick_deaths=4,
    max_patience_s=1.5,
    hung_s=1.0,
    look_every_s=0.2,
    stop_s=2.0,
)
SERVER = (
    "import http.server, sys\n"
    "class Answer(http.server.BaseHTTPRequestHandler):\n"
    "    def do_HEAD(self): self.send_response(200); self.end_headers()\n"
    "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Answer).serve_forever()\n"
)


class Room:
    """A supervisor in a thread of this process, and how its children are doing."""

    def __init__(self, folder: Path, guard: Guard) -> None:
        self.folder = folder
        self.guard = guard
        self.state_file = folder / "up.json"
        self.over = threading.Event()
        self.error: BaseException | None = None

    def spec(self, name: str, *command: str) -> ChildSpec:
        return ChildSpec(name, command, dict(os.environ), self.folder / f"{name}.log", self.folder)

    def python(self, name: str, code: str, *arguments: str) -> ChildSpec:
        return self.spec(name, sys.executable, "-c", code, *arguments)

    def child(self, name: str) -> ChildState | None:
        state = read_supervisor_state(self.state_file)
        return next((one for one in state.children if one.name == name), None) if state else None

    def starts(self, name: str) -> list[float]:
        """When a child that notes its starts did start."""
        path = self.folder / f"{name}.starts"
        return [float(line) for line in path.read_text().split()] if path.exists() else []

    def noting(self, name: str, then: str) -> ChildSpec:
        """A child that notes when it starts and then does something."""
        note = f"import time; open('{name}.starts', 'a').write(str(time.time()) + '\\n')\n"
        return self.python(name, note + then)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    with guarded_processes(tmp_path / "guard.log") as guard:
        yield Room(tmp_path, guard)


@contextmanager
def supervised(room: Room, *children: ChildSpec, timing: Timing = FAST) -> Iterator[None]:
    """Run a supervisor, in a thread because the test has the main one; signals are tested elsewhere."""
    supervisor = Supervisor(children, guard=room.guard, state_file=room.state_file, timing=timing)

    def run() -> None:
        try:
            supervisor.run()
        except BaseException as error:
            room.error = error
        room.over.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        supervisor.stop()
        thread.join(timeout=60)
    assert not thread.is_alive()


def wait_until(condition: Callable[[], object], *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def pid_of(room: Room, name: str) -> int:
    child = room.child(name)
    return child.pid if child and child.is_alive() else 0


def test_a_child_that_is_killed_is_started_again_and_its_neighbour_is_left_alone(
    room: Room,
) -> None:
    with supervised(room, room.spec("one", "sleep", "60"), room.spec("two", "sleep", "60")):
        wait_until(lambda: pid_of(room, "one") and pid_of(room, "two"))
        first, other = pid_of(room, "one"), pid_of(room, "two")
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: pid_of(room, "one") not in (0, first))
        child = room.child("one")
        assert child is not None
        assert (child.restarts, child.last_exit_code, child.state) == (1, -9, "running")
        assert pid_of(room, "two") == other
    assert not psutil.pid_exists(other)
    assert room.error is None


def planned_waits(caplog: pytest.LogCaptureFixture) -> list[float]:
    """The pauses that were said, each in the line that says of what its child died."""
    said = (
        re.search(r"starting it again in (\S+) s$", record.message) for record in caplog.records
    )
    return [float(match[1]) for match in said if match]


def test_back_off_doubles_up_to_its_end(room: Room, caplog: pytest.LogCaptureFixture) -> None:
    timing = replace(
        FAST, max_quick_deaths=99, first_backoff_s=0.3, max_backoff_s=1.2, settled_s=60
    )
    with supervised(room, room.noting("dying", "raise SystemExit(3)"), timing=timing):
        wait_until(lambda: len(room.starts("dying")) >= 6)
    planned = [0.3, 0.6, 1.2, 1.2, 1.2]
    assert planned_waits(caplog)[:5] == planned
    for (before, after), wait_s in zip(pairwise(room.starts("dying")), planned, strict=False):
        assert after - before >= wait_s


def test_a_child_that_stayed_up_starts_again_at_the_first_back_off(
    room: Room, caplog: pytest.LogCaptureFixture
) -> None:
    timing = replace(
        FAST, settled_s=0.5, max_quick_deaths=2, first_backoff_s=0.2, max_backoff_s=9.0
    )
    with supervised(room, room.noting("steady", "time.sleep(0.8)"), timing=timing):
        wait_until(lambda: len(room.starts("steady")) >= 5)
    assert planned_waits(caplog)[:4] == [0.2] * 4
    assert all(after - before >= 1.0 for before, after in pairwise(room.starts("steady")))
    assert room.error is None


def test_an_end_that_time_mends_is_waited_for_and_does_not_count(room: Room) -> None:
    spec = replace(room.noting("early", "raise SystemExit(49)"), patience={49: 0.5})
    timing = replace(FAST, max_patience_s=60.0, max_quick_deaths=2)
    with supervised(room, spec, timing=timing):
        wait_until(lambda: len(room.starts("early")) >= 5)
    starts = room.starts("early")
    assert all(b - a >= 0.5 for a, b in pairwise(starts))
    assert room.error is None


def test_patience_has_an_end(room: Room, caplog: pytest.LogCaptureFixture) -> None:
    spec = replace(room.noting("early", "raise SystemExit(49)"), patience={49: 0.4})
    with supervised(room, spec, timing=replace(FAST, first_backoff_s=0.1, settled_s=60)):
        wait_until(room.over.is_set)
    assert isinstance(room.error, EngineError)
    assert "early ended 4 times in a row" in str(room.error)
    # Patience is 0.4 s each time; then come four that count, the last without a pause after it.
    *patient, first, second, third = planned_waits(caplog)
    assert [first, second, third] == [0.1, 0.2, 0.4]
    assert set(patient) == {0.4}


def test_a_stopped_child_that_had_answered_is_killed_and_started_again(room: Room) -> None:
    port = free_port()
    answers: list[bool] = []

    def probe() -> bool:
        answers.append(http_answers("127.0.0.1", port, tls=False, timeout_s=0.5))
        return answers[-1]

    with supervised(room, replace(room.python("server", SERVER, str(port)), probe=probe)):
        # What was answered is taken note of as the next question is put.
        wait_until(lambda: any(answers[:-1]))
        first = pid_of(room, "server")
        os.kill(first, signal.SIGSTOP)
        # A stopped process still takes connections.
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            pass
        wait_until(lambda: pid_of(room, "server") not in (0, first))
        wait_until(lambda: http_answers("127.0.0.1", port, tls=False))
        child = room.child("server")
        assert child is not None
        assert child.last_exit_code == -9


def test_a_child_that_stops_answering_is_killed_though_it_runs(room: Room) -> None:
    answers = room.folder / "answers"
    answers.touch()
    spec = replace(room.spec("mute", "sleep", "60"), probe=answers.exists)
    with supervised(room, spec):
        wait_until(lambda: pid_of(room, "mute"))
        first = pid_of(room, "mute")
        time.sleep(FAST.hung_s + 0.5)
        assert pid_of(room, "mute") == first
        answers.unlink()
        wait_until(lambda: pid_of(room, "mute") not in (0, first))


def test_a_slow_start_is_not_hanging(room: Room) -> None:
    spec = replace(room.spec("slow", "sleep", "60"), probe=lambda: False)
    with supervised(room, spec):
        wait_until(lambda: pid_of(room, "slow"))
        first = pid_of(room, "slow")
        time.sleep(FAST.hung_s + 1.0)
        assert pid_of(room, "slow") == first


def test_without_a_probe_a_stopped_child_is_still_noticed(room: Room) -> None:
    with supervised(room, room.spec("frozen", "sleep", "60")):
        wait_until(lambda: pid_of(room, "frozen"))
        first = pid_of(room, "frozen")
        os.kill(first, signal.SIGSTOP)
        wait_until(lambda: pid_of(room, "frozen") not in (0, first))


def test_a_child_that_does_not_stay_up_ends_everything_with_the_end_of_its_log(room: Room) -> None:
    lines = "; ".join(f"print('line {number}', flush=True)" for number in range(30))
    doomed = room.python("doomed", lines + "; raise SystemExit(7)")
    with supervised(room, room.spec("other", "sleep", "60"), doomed):
        wait_until(lambda: pid_of(room, "other"))
        other = pid_of(room, "other")
        wait_until(room.over.is_set)
        assert not psutil.pid_exists(other)
    assert isinstance(room.error, EngineError)
    assert room.error.exit_code == 5
    said = str(room.error)
    assert "doomed ended 4 times in a row" in said
    assert "with exit code 7" in said
    assert "line 29" in said
    assert "line 10" not in said
    assert str(room.folder / "doomed.log") in said


def test_a_command_that_is_not_there_is_an_error_that_names_it(room: Room) -> None:
    with supervised(room, room.spec("absent", "/no/such/command")):
        wait_until(room.over.is_set)
    assert isinstance(room.error, EngineError)
    assert "absent ended 4 times" in str(room.error)


def test_a_log_that_grew_too_long_keeps_its_newest_half(room: Room) -> None:
    spec = room.python(
        "chatty",
        "import time\n"
        "for number in range(2000): print(f'{number:09d}', flush=True)\n"
        "time.sleep(1.5); print('the end', flush=True); time.sleep(60)",
    )
    with supervised(room, spec, timing=replace(FAST, max_log_bytes=4000)):
        log = room.folder / "chatty.log"
        wait_until(lambda: log.exists() and "the end" in log.read_text())
        text = log.read_text()
    assert len(text) <= 4000
    assert "000001999\nthe end" in text
    assert "000000001" not in text
    assert "\0" not in text


def test_a_state_file_that_cannot_be_written_is_said_once_and_ends_nothing(
    room: Room, caplog: pytest.LogCaptureFixture
) -> None:
    room.state_file.mkdir()
    with supervised(room, room.noting("busy", "time.sleep(60)")):
        wait_until(lambda: room.starts("busy"))
        time.sleep(1.0)
        assert not room.over.is_set()
    said = [r for r in caplog.records if "cannot be written" in r.message]
    assert len(said) == 1
    assert room.error is None


def test_what_is_no_state_is_none(tmp_path: Path) -> None:
    assert read_supervisor_state(tmp_path / "up.json") is None
    for content in ("", "[]", '{"pid": 1}', '{"children": 3}'):
        (tmp_path / "up.json").write_text(content)
        assert read_supervisor_state(tmp_path / "up.json") is None


def test_a_number_that_another_process_has_now_is_not_the_child() -> None:
    ours = ChildState("us", os.getpid(), "running", time.time(), 0, None)
    assert ours.is_alive()
    assert not replace(ours, since=time.time() - 10**6).is_alive()
    assert not replace(ours, pid=0).is_alive()
    assert json.loads(json.dumps(asdict(ours)))["name"] == "us"


_SUPERVISE = """
import sys
from pathlib import Path
from common.process_guard import guarded_processes
from common.supervisor import ChildSpec, Supervisor
folder = Path(sys.argv[1])
import os
# The first dies with its own child left behind; the second has one that is in a session of its own.
fork = "setsid sleep 77 & sleep 78"
with guarded_processes(folder / "guard.log") as guard:
    children = [
        ChildSpec(name, ("sh", "-c", fork), dict(os.environ), folder / f"{name}.log", folder)
        for name in ("one", "two")
    ]
    Supervisor(children, guard=guard, state_file=folder / "up.json").run()
"""


def _carrying(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if mark in process.environ().get("CONSILIUM_PROCESS_MARK", ""):
                found.append(process)
    return found


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_the_supervisor_ends(how: signal.Signals, tmp_path: Path) -> None:
    state_file = tmp_path / "up.json"
    supervisor = subprocess.Popen(
        [sys.executable, "-c", _SUPERVISE, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        wait_until(
            lambda: (state := read_supervisor_state(state_file)) and len(state.children) == 2
        )
        state = read_supervisor_state(state_file)
        assert state is not None
        # Two shells with two sleeps each.
        wait_until(lambda: len(_carrying(state.mark)) == 6)
        supervisor.send_signal(how)
        assert supervisor.wait(timeout=30) == (-9 if how == signal.SIGKILL else 0)
    finally:
        supervisor.kill()
        supervisor.wait()
    wait_until(lambda: not _carrying(state.mark))
