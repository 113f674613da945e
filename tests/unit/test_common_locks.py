"""Locks: one holder, named by its number; freed by its death; not disturbed by who only looks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.locks import LockHeldError, hold_lock, lock_holder

ROOT = Path(__file__).parents[2]
_HOLD = (
    "import sys, time; from pathlib import Path; from common.locks import hold_lock\n"
    "with hold_lock(Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_nobody_holds_a_lock_that_is_not_there_or_was_left(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert lock_holder(path) is None
    with hold_lock(path):
        assert lock_holder(path) == os.getpid()
    assert path.exists()
    assert lock_holder(path) is None


def test_a_second_one_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as process:
        assert lock_holder(path) == process.pid
        with (
            pytest.raises(LockHeldError, match=f"process {process.pid} holds .*lock") as caught,
            hold_lock(path, wait_s=0.1),
        ):
            pass
        assert caught.value.pid == process.pid


def test_a_killed_holder_frees_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert lock_holder(path) is None
        with hold_lock(path, wait_s=0.0):
            assert lock_holder(path) == os.getpid()


def test_a_child_of_the_holder_does_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold_lock(path):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        assert lock_holder(path) is None
    finally:
        child.kill()
        child.wait()


def test_who_waits_gets_the_lock_when_it_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as process:
        started = time.monotonic()
        threading.Timer(0.5, process.kill).start()
        with hold_lock(path, wait_s=60):
            assert time.monotonic() - started > 0.4


def test_looking_never_keeps_anybody_from_holding(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            lock_holder(path)

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for thread in lookers:
        thread.start()
    try:
        for _ in range(200):
            with hold_lock(path):
                pass
    finally:
        over.set()
        for thread in lookers:
            thread.join()


def test_looking_does_not_make_the_file(tmp_path: Path) -> None:
    lock_holder(tmp_path / "lock")
    assert not (tmp_path / "lock").exists()
