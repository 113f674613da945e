"""The runs that a coordinator was asked for: launches/, and how each stands."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError
from common.locks import lock_holder
from server.history import Event, read_events
from server.launch import read_launch
from server.run_folder import RunFolder, run_lock
from server.run_state import RunState, run_state


@dataclass(frozen=True, slots=True)
class AskedRun:
    """A run with a launch. holder: the process that runs it now, None when none does."""

    folder: RunFolder
    overrides: Path
    events: Sequence[Event]
    holder: int | None
    state: RunState

    @property
    def uid(self) -> str:
        """Its name."""
        return self.folder.run_uid


class AskedRuns:
    """Reads the runs of a coordinator again and again; a history that has not changed only once."""

    def __init__(self, launches: Path) -> None:
        self._launches = launches
        self._folders: dict[tuple[Path, int], RunFolder | None] = {}
        self._events: dict[Path, tuple[tuple[int, int], list[Event]]] = {}

    def all(self) -> list[AskedRun]:
        """Return every run whose folder is still there, the one asked for last at the end."""
        runs = [
            self._look(folder)
            for path in self._launches.glob("*.json")
            if (folder := self._folder(path)) is not None and (folder.path / "run.toml").is_file()
        ]
        return sorted(runs, key=lambda run: (run.state.requested_at, run.uid))

    def open(self) -> list[AskedRun]:
        """Return the runs that are not over; what runs comes first."""
        left = [run for run in self.all() if not run.state.is_over]
        return sorted(left, key=lambda run: run.holder is None)

    def find(self, uid: str) -> AskedRun | None:
        """Return one run, None when there is none."""
        return next((run for run in self.all() if run.uid == uid), None)

    def _folder(self, launch: Path) -> RunFolder | None:
        try:
            key = (launch, launch.stat().st_mtime_ns)
            if key not in self._folders:
                self._folders[key] = None
                self._folders[key] = RunFolder(Path(read_launch(launch).run_dir), launch.stem)
            return self._folders[key]
        except (OSError, ConfigError):
            return None

    def _look(self, folder: RunFolder) -> AskedRun:
        # Who holds the lock first: an end that is written in between is then seen.
        holder = lock_holder(run_lock(folder.path))
        events = self._read(folder.history)
        state = run_state(events, held=holder is not None)
        return AskedRun(folder, self._launches / f"{folder.run_uid}.toml", events, holder, state)

    def _read(self, history: Path) -> list[Event]:
        try:
            status = os.stat(history)
        except FileNotFoundError:
            return []
        version = (status.st_mtime_ns, status.st_size)
        if history not in self._events or self._events[history][0] != version:
            self._events[history] = (version, list(read_events(history)))
        return self._events[history][1]
