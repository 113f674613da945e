"""One task at a time: who waits, who is overtaken, whose time is over."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from client.turn import Caller, Turn
from common.errors import BusyError, CancelledError, ExpiredError, OvertakenError
from common.locks import lock_holder
from common.records import Task


def _task(server_round: int = 1, run_uid: str = "run-1") -> Task:
    return Task("train", run_uid, "north", server_round, 1, 2_000_000_000)


def _soon() -> float:
    return time.monotonic() + 120.0


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class _Waiter(threading.Thread):
    """Wants its turn for a task, as another process of the site would; each has locks of its own."""

    def __init__(self, folder: Path, task: Task, *, ends_s: float | None = None) -> None:
        super().__init__(daemon=True)
        self.had_turn = threading.Event()
        self.error: Exception | None = None
        self._folder, self._task, self._ends_s = folder, task, ends_s or _soon()
        self.start()

    def run(self) -> None:
        try:
            with Turn(self._folder).take(self._task, ends_s=self._ends_s):
                self.had_turn.set()
        except Exception as error:
            self.error = error

    def is_announced(self) -> bool:
        name = f"{self._task.run_uid}.{self._task.server_round}"
        return lock_holder(self._folder / "waiting" / name) is not None


def test_the_second_waits_until_the_first_is_done(tmp_path: Path) -> None:
    with Turn(tmp_path).take(_task(), ends_s=_soon()) as on_step:
        second = _Waiter(tmp_path, _task())
        _wait_until(second.is_announced)
        # The same task, asked for again: the one that is trained is the one that is wanted.
        on_step(1)
        assert not second.had_turn.wait(0.2)
    assert second.had_turn.wait(60.0)
    second.join(60.0)
    assert list((tmp_path / "waiting").iterdir()) == []


def test_a_later_round_of_the_same_run_overtakes(tmp_path: Path) -> None:
    with Turn(tmp_path).take(_task(3), ends_s=_soon()) as on_step:
        on_step(1)
        later = _Waiter(tmp_path, _task(4))
        _wait_until(later.is_announced)
        with pytest.raises(
            OvertakenError, match="round 4 of this run is here, so round 3 is given up"
        ):
            on_step(1)
    assert later.had_turn.wait(60.0)


@pytest.mark.parametrize(
    "other",
    [_task(2), _task(9, run_uid="run-2"), _task(9, run_uid="run"), _task(9, run_uid="run-1.b")],
)
def test_nothing_else_overtakes(tmp_path: Path, other: Task) -> None:
    with Turn(tmp_path).take(_task(3), ends_s=_soon()) as on_step:
        waiter = _Waiter(tmp_path, other)
        _wait_until(waiter.is_announced)
        on_step(1)
    assert waiter.had_turn.wait(60.0)


def test_who_died_while_waiting_overtakes_nobody(tmp_path: Path) -> None:
    with Turn(tmp_path).take(_task(3), ends_s=_soon()) as on_step:
        (tmp_path / "waiting" / "run-1.4").touch()
        on_step(1)


def test_a_turn_ends_with_its_time(tmp_path: Path) -> None:
    with (
        Turn(tmp_path).take(_task(3), ends_s=time.monotonic() - 0.1) as on_step,
        pytest.raises(ExpiredError, match=r"round 3 is over.*federation\.deadline-s"),
    ):
        on_step(1)


def test_nobody_waits_beyond_the_tasks_own_time(tmp_path: Path) -> None:
    with Turn(tmp_path).take(_task(), ends_s=_soon()):
        second = _Waiter(tmp_path, _task(), ends_s=time.monotonic() + 0.5)
        second.join(60.0)
    assert isinstance(second.error, ExpiredError)
    assert "another task is being trained here (process" in str(second.error)


def _hold_and_die(folder: Path) -> None:
    turn = Turn(folder).take(_task(), ends_s=_soon())
    turn.__enter__()
    time.sleep(60)


def test_the_turn_of_a_killed_process_is_free(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_hold_and_die, args=(tmp_path,))
    process.start()
    waiter = None
    try:
        lock = tmp_path / "turn.lock"
        _wait_until(lambda: lock.exists() and lock.read_text() == str(process.pid))
        waiter = _Waiter(tmp_path, _task())
        assert not waiter.had_turn.wait(0.2)
    finally:
        process.kill()
        process.join()
    assert waiter.had_turn.wait(60.0)


def test_of_two_that_came_at_once_the_second_is_told_when_the_first_has_its_turn(
    tmp_path: Path,
) -> None:
    turn, told = Turn(tmp_path), Caller(waits=False)
    # Nobody trains yet: both may try.
    turn.require_free(_task(3), told)
    other = _task(3, run_uid="run-2")
    turn.require_free(other, told)
    with (
        turn.take(_task(3), ends_s=_soon(), caller=told),
        pytest.raises(BusyError, match=r"trains round 3 of run run-1; ask again"),
        turn.take(other, ends_s=_soon(), caller=told),
    ):
        pass
    with turn.take(other, ends_s=_soon(), caller=told):
        pass


def test_who_is_gone_neither_waits_nor_trains_on(tmp_path: Path) -> None:
    gone = Caller(is_there=lambda: False)
    with Turn(tmp_path).take(_task(3), ends_s=_soon(), caller=gone) as on_step:
        with pytest.raises(CancelledError, match="stopped after step 1 of round 3"):
            on_step(1)
        with (
            pytest.raises(CancelledError, match="nobody waits"),
            Turn(tmp_path).take(_task(9), ends_s=_soon(), caller=gone),
        ):
            pass
