"""Locks on files: held by a living process or by nobody, whatever happened to the one before."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A look at a lock takes it for a moment: whoever wants it must not mistake that for a holder.
_LOOKS_END_S = 1.0


class LockHeldError(OSError):
    """Another process holds the lock. pid: its number, 0 when it has not said so yet."""

    def __init__(self, path: Path, pid: int) -> None:
        super().__init__(f"process {pid} holds {path}")
        self.pid = pid


@contextmanager
def hold_lock(path: Path, *, wait_s: float = _LOOKS_END_S) -> Iterator[None]:
    """Hold a file's lock for as long as the block runs; the system lets go when the process dies.

    path: made if missing, and left there; it holds the number of the process that held it last.
    wait_s: how long to try. Raises LockHeldError after that.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + wait_s
        while not _try_lock(descriptor):
            if time.monotonic() >= deadline:
                raise LockHeldError(path, _read_pid(descriptor))
            time.sleep(0.02)
        # Who holds it is a courtesy: a full disk must not keep anybody from it.
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def lock_holder(path: Path) -> int | None:
    """Return the number of the process that holds a lock now, None when nobody does."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return None if _try_lock(descriptor) else _read_pid(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_pid(descriptor: int) -> int:
    text = os.pread(descriptor, 32, 0)
    return int(text) if text.isdigit() else 0
