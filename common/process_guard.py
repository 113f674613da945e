"""End every process of a piece of work, however the caller leaves it: return, Ctrl-C or kill -9.

Flower and Ray detach their children from the parent's process group and let them outlive it, so
neither a process group nor a tree finds them all. A mark in their environment does. Guards nest: what an
inner one starts carries the outer one's mark as well.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # ships no types

logger = logging.getLogger(__name__)

_MARK = "CONSILIUM_PROCESS_MARK"
_ASK_TIMEOUT_S = 3.0
_KILL_TIMEOUT_S = 5.0
_COMMAND = "import sys; from common.process_guard import _guard; _guard(*sys.argv[1:])"


@dataclass(frozen=True, slots=True)
class Guard:
    """`mark`: variables for the environment of each process; `started`: children to reap at the end.

    own_mark: what `end_marked` takes. pid: of the process that opened the guard.
    """

    mark: dict[str, str]
    own_mark: str
    pid: int = field(default_factory=os.getpid)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)


@contextmanager
def guarded_processes(log_file: Path, scratch_dir: Path | None = None) -> Iterator[Guard]:
    """Give the mark for processes; on leaving, end all that carry it, and their children.

    The ending is done by a guard process when its standard input closes, which the system does even
    for a caller that was killed. The guard also removes scratch_dir and writes to log_file.
    """
    mark = uuid.uuid4().hex
    guard = Guard({_MARK: ":".join(filter(None, [os.environ.get(_MARK), mark]))}, mark)
    search_path = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    with log_file.open("ab") as log:
        watcher = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, mark, str(scratch_dir or "")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search_path))},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the caller alone
        )
    try:
        yield guard
    finally:
        watcher.communicate()
        for process in guard.started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1.0)
        if watcher.returncode != 0:
            logger.warning("processes marked %s=%s may still run; read %s", _MARK, mark, log_file)


def _guard(mark: str, scratch_dir: str) -> None:
    sys.stdin.read()
    left = end_marked(mark)
    if scratch_dir:
        shutil.rmtree(scratch_dir, ignore_errors=True)
    if left:
        sys.exit(f"still running after kill: {sorted(left)}")


def end_marked(mark: str) -> list[int]:
    """Ask, then kill; return the pids that are left.

    Ray's workers write their titles over their environment. They are found as descendants, and
    remembered, because they change parents when theirs die.
    """
    known = _marked(mark)
    for process in known:
        with suppress(psutil.Error):
            process.terminate()
    _wait_for_end(known, timeout_s=_ASK_TIMEOUT_S)
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while time.monotonic() < deadline:
        known |= _marked(mark)
        for process in known:
            with suppress(psutil.Error):
                process.kill()
        if not _wait_for_end(known, timeout_s=1.0):
            return []
    return [process.pid for process in known if _is_alive(process)]


def _marked(mark: str) -> set[psutil.Process]:
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if mark in process.environ().get(_MARK, "").split(":"):
                found.add(process)
                found.update(process.children(recursive=True))
    return found


def _wait_for_end(processes: set[psutil.Process], *, timeout_s: float) -> set[psutil.Process]:
    """Return those still alive; psutil.wait_procs would also wait for zombies of the caller."""
    deadline = time.monotonic() + timeout_s
    while alive := {process for process in processes if _is_alive(process)}:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return alive


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
