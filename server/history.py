"""history.jsonl: one line for every event of a run, durable before the run goes on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Event = Mapping[str, Any]
Listener = Callable[[Event], None]


class History:
    """Appends events to a file and tells a listener.

    Every event has `event` (its kind) and `time` (Unix seconds). Kinds: requested (by a person),
    run-started, resumed, base, roster-changed, waiting, approval, excluded, revoked, sites, round-started,
    reply, refused (round 0: before any), asked-again, late, retry, round, early-stop, finished, stopped,
    gave-up.
    """

    def __init__(self, path: Path, *, listener: Listener = lambda event: None) -> None:
        self._path = path
        self._listener = listener
        _end_cut_line(path)

    def record(self, event: str, **details: Any) -> None:
        """Append one event. `round` events are fsynced: they are results."""
        entry = {"event": event, "time": round(time.time(), 3), **details}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            if event == "round":
                file.flush()
                os.fsync(file.fileno())
        self._listener(entry)

    def events(self) -> list[dict[str, Any]]:
        """Return every whole line so far; a last line cut by a crash is left out."""
        return read_events(self._path)


def _end_cut_line(path: Path) -> None:
    """Give a last line that a crash cut its line end, or the next event would be lost with it."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.write(b"\n")


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events in a history file, [] when there is none; what is no event is left out."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        # A damaged line must not take a coordinator's other runs down with this one.
        if _is_event(event):
            events.append(event)
    return events


def _is_event(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and isinstance(line.get("event"), str)
        and isinstance(line.get("time"), int | float)
    )
