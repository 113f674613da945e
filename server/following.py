"""Following a run from outside of it, until it is over."""

from __future__ import annotations

import time
from collections.abc import Callable

from common.errors import CheckpointError
from server.coordinator import Coordinator
from server.history import Listener
from server.keeper import read_submissions
from server.run_state import RunState
from server.runs import AskedRuns

_LOOK_EVERY_S = 0.5


def follow_run(
    coordinator: Coordinator, uid: str, *, listener: Listener, say: Callable[[str], None]
) -> RunState:
    """Return how a run ended.

    listener: is told every event since the run was last asked for. say: is told why it does not go on,
    once for each reason. Raises CheckpointError when its folder is taken away.
    """
    runs = AskedRuns(coordinator.launches)
    seen: int | None = None
    said = ""
    while True:
        run = runs.find(uid)
        if run is None:
            raise CheckpointError(f"run {uid} is gone: its folder or its launch was removed")
        if seen is None:
            asked = [n for n, event in enumerate(run.events) if event["event"] == "requested"]
            seen = asked[-1] if asked else 0
        for event in run.events[seen:]:
            listener(event)
        seen = len(run.events)
        if run.state.is_over:
            return run.state
        trouble = "" if run.holder is not None else _trouble(coordinator, uid)
        if trouble and trouble != said:
            say(trouble)
        said = trouble
        time.sleep(_LOOK_EVERY_S)


def _trouble(coordinator: Coordinator, uid: str) -> str:
    if coordinator.up_pid() is None:
        return (
            f"no `consilium server up` runs for {coordinator.folder}; the run begins, or goes on, when "
            "one does"
        )
    submission = read_submissions(coordinator.keeper_state).get(uid)
    return submission.trouble if submission else ""
