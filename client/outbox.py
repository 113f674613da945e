"""Replies on disk: written whole and durably before they are sent, kept to be sent again.

A reply is one folder, `outbox/<task_id>/`, that appears by a single rename. It holds no sampler or
noise state, only what left or is about to leave.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.files import Buffer, fsync_folder, write_atomically

# Replies of a run's newest rounds that are kept to be sent again: a coordinator may go on from an earlier
# checkpoint, of which it keeps three by default.
KEPT_ROUNDS = 4
_ABANDONED_S = 24 * 3600.0
_ADAPTER, _REST = "adapter.safetensors", "rest.json"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What training one task gave: adapter as safetensors bytes, and numbers that may leave.

    adapter: one that was found is a view of its file, which takes no memory of its own.
    failure: the error code that is this task's one answer, "" when it succeeded; the rest is empty then.
    """

    adapter: Buffer
    numbers: Mapping[str, float]
    failure: str = ""


class Outbox:
    """The folder of outcomes, one per task_id."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._sweep()

    def find(self, task_id: str) -> Outcome | None:
        """Return the outcome stored for a task, or None."""
        folder = self._folder / task_id
        if not folder.is_dir():
            return None
        rest = json.loads((folder / _REST).read_text())
        if rest["failure"]:
            return Outcome(b"", {}, rest["failure"])
        return Outcome(_map(folder / _ADAPTER), rest["numbers"])

    def holds(self, task_id: str) -> bool:
        """Whether an outcome is stored for a task."""
        return (self._folder / task_id).is_dir()

    def forget(self, task_id: str, *, failure: str) -> None:
        """Let go of a stored adapter: from now on the task's answer is a code, as of one that failed.

        One that failed keeps its own code; one that is not there, or was let go of, is left as it is.
        """
        adapter = self._folder / task_id / _ADAPTER
        if not adapter.exists():
            return
        rest = adapter.with_name(_REST)
        if not json.loads(rest.read_text())["failure"]:
            # First: cut off in between, the adapter is there and never found.
            content = json.dumps({"numbers": {}, "failure": failure}).encode()
            write_atomically(rest, content, mode=0o600)
        # Whoever still reads it keeps it until then.
        adapter.unlink()
        fsync_folder(adapter.parent)

    def store(self, task_id: str, outcome: Outcome) -> Outcome:
        """Keep an outcome durably and return the one that stands, as `find` does.

        When another process stored one for this task first, that one stands and ours is dropped:
        one output per task ever leaves.
        """
        temporary = Path(tempfile.mkdtemp(dir=self._folder, prefix=".writing-"))
        try:
            write_atomically(temporary / _ADAPTER, outcome.adapter, mode=0o600)
            rest = {"numbers": dict(outcome.numbers), "failure": outcome.failure}
            write_atomically(temporary / _REST, json.dumps(rest).encode(), mode=0o600)
            try:
                os.rename(temporary, self._folder / task_id)
            except OSError:
                standing = self.find(task_id)
                if standing is None:
                    raise
                return standing
            fsync_folder(self._folder)
            # The one on disk: memory needs no second one.
            return self.find(task_id) or outcome
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what a crash left half-written: long ago, since another process may be writing."""
        for leftover in self._folder.glob(".writing-*"):
            if time.time() - leftover.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(leftover, ignore_errors=True)


def _map(path: Path) -> Buffer:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            # Which cannot be mapped.
            return b""
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
