"""How a run stands, from its history and whether a living process holds its lock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from server.history import Event

# Trouble of machines, not of the run: asking again later is the remedy.
RESUMABLE = frozenset({"engine", "disk", "internal"})
# The code of a stop that a person ordered.
BY_ORDER = "stopped"

RunKind = Literal["waiting", "running", "finished", "stopped", "gave-up"]


@dataclass(frozen=True, slots=True)
class RunState:
    """waiting: nothing runs it now, and something should. code, message: of what ended or stopped it.

    rounds_done: newest committed round. rounds: planned, 0 while unknown. requested_at: when a person
    last asked for it (Unix seconds). ran_at: when a ServerApp last said anything of it.
    """

    kind: RunKind
    code: str = ""
    message: str = ""
    rounds_done: int = 0
    rounds: int = 0
    requested_at: float = 0.0
    ran_at: float = 0.0

    @property
    def is_over(self) -> bool:
        """Whether nothing will go on with it by itself."""
        if self.kind == "stopped":
            return self.code not in RESUMABLE
        return self.kind in ("finished", "gave-up")


def run_state(events: Iterable[Event], *, held: bool) -> RunState:
    """Return how a run stands.

    events: its history, in order. held: whether a living process holds its lock.
    The last end decides, unless the run was begun, resumed or requested after it. Who stops a run by
    order is not contradicted by what its ServerApp makes of being stopped.
    """
    end: Event | None = None
    kind: RunKind = "waiting"
    rounds_done = rounds = 0
    requested_at = ran_at = 0.0
    for event in events:
        said = event["event"]
        by_order = end is not None and end.get("code") == BY_ORDER
        if said == "requested":
            end, requested_at = None, event["time"]
        elif said in ("run-started", "resumed"):
            rounds = event["rounds"]
            # A ServerApp that was still loading when it was stopped does not begin the run again.
            end = end if by_order else None
        elif said == "round":
            rounds_done = max(rounds_done, event["round"])
        elif said == "finished":
            end, kind = event, "finished"
        elif said == "gave-up":
            end, kind = event, "gave-up"
        elif said == "stopped" and not by_order:
            end, kind = event, "stopped"
        if said not in ("requested", "gave-up") and event.get("code") != BY_ORDER:
            ran_at = event["time"]
    if end is None:
        kind = "running" if held else "waiting"
    return RunState(
        kind=kind,
        code=end.get("code", "") if end else "",
        message=end.get("message", "") if end else "",
        rounds_done=rounds_done,
        rounds=rounds,
        requested_at=requested_at,
        ran_at=ran_at,
    )
