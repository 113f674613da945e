"""What a supervisor says of itself and its children in a small JSON file, for `status` to read.

The file tells what was so when it was written: whether a process lives now, ask `is_alive`.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil  # type: ignore[import-untyped]  # ships no types


@dataclass(frozen=True, slots=True)
class ChildState:
    """One child: `running` since (Unix seconds), or `waiting` to be started again, pid 0.

    restarts: how often it was started again. last_exit_code: None until it has ended once; negative is
    the number of a signal.
    """

    name: str
    pid: int
    state: Literal["running", "waiting"]
    since: float
    restarts: int
    last_exit_code: int | None

    def is_alive(self) -> bool:
        """Whether its process runs now, by the system's word; a zombie or a later process does not."""
        if self.pid == 0:
            return False
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            # A process that began after it took over a number that was free again.
            same = process.create_time() <= self.since + 1.0
            return bool(same and process.status() != psutil.STATUS_ZOMBIE)
        return False


@dataclass(frozen=True, slots=True)
class SupervisorState:
    """pid, since: of the supervisor. mark: what its children carry (common/process_guard.py)."""

    pid: int
    since: float
    mark: str
    children: tuple[ChildState, ...]

    def write(self, path: Path) -> None:
        """Replace the file in one step, not durably: after a power cut no process is left to speak of.

        Raises OSError when the disk is full.
        """
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """A supervised process. alive: by the system's word. since: Unix seconds, of the start or the end."""

    name: str
    alive: bool
    pid: int
    since: float
    restarts: int
    last_exit_code: int | None


def process_statuses(state: SupervisorState | None) -> tuple[ProcessStatus, ...]:
    """Return how a supervisor's children are now; none when there is no supervisor to ask."""
    return tuple(
        ProcessStatus(
            child.name,
            child.is_alive(),
            child.pid,
            child.since,
            child.restarts,
            child.last_exit_code,
        )
        for child in (state.children if state is not None else ())
    )


def read_supervisor_state(path: Path) -> SupervisorState | None:
    """Return what a supervisor last wrote; None when there is nothing usable."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        children = tuple(ChildState(**child) for child in content["children"])
        return SupervisorState(**{**content, "children": children})
    except (OSError, ValueError, TypeError, KeyError):
        return None
