"""One task at a time at a site, whichever of its processes a task comes to.

Flower may start a second ClientApp while the first still trains: after a SuperNode's restart, or for a run
that was submitted again. Whoever comes second waits for the first, and then finds its result in the
outbox if it was the same task. If the second is of a later round of the same run, nobody waits for the
first any more: it stops at its next step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from common.errors import ExpiredError, OvertakenError
from common.locks import LockHeldError, hold_lock, lock_holder
from common.records import Task


class Turn:
    """Whose turn it is to train at a site, as locks in its state folder."""

    def __init__(self, folder: Path) -> None:
        self._lock = folder / "turn.lock"
        self._waiting = folder / "waiting"
        self._waiting.mkdir(parents=True, exist_ok=True, mode=0o700)

    @contextmanager
    def take(self, task: Task, *, ends_s: float) -> Iterator[Callable[[], None]]:
        """Wait for one's turn and have it for as long as the block runs.

        ends_s: when the task's time is over (time.monotonic). Yields what is to be called after every
        step: it raises OvertakenError when a later round's task waits, and ExpiredError when time is over.
        Raises ExpiredError when the turn does not come before that.
        """
        own = self._waiting / f"{task.run_uid}.{task.server_round}"
        with ExitStack() as turn:
            with ExitStack() as waiting:
                # The lock says that somebody waits: who was killed while waiting holds none. Two that wait
                # for the same round need to say it only once.
                with suppress(LockHeldError):
                    waiting.enter_context(hold_lock(own))
                    waiting.callback(own.unlink, missing_ok=True)
                try:
                    left_s = max(1.0, ends_s - time.monotonic())
                    turn.enter_context(hold_lock(self._lock, wait_s=left_s))
                except LockHeldError as error:
                    raise ExpiredError(
                        f"another task is being trained here (process {error.pid}), and this one's time "
                        "was over before its turn came"
                    ) from None
            yield lambda: self._check(task, ends_s=ends_s)

    def _check(self, task: Task, *, ends_s: float) -> None:
        if time.monotonic() > ends_s:
            raise ExpiredError(
                f"the time for round {task.server_round} is over, so nobody waits for this task any more; "
                "what it has cost stays charged. If that happens often, ask the coordinator for a "
                "longer federation.deadline-s"
            )
        for path in self._waiting.glob(f"{task.run_uid}.*"):
            run_uid, _, text = path.name.rpartition(".")
            server_round = int(text)
            # A run's name may hold a dot: "a.*" finds those of "a.b" too.
            later = run_uid == task.run_uid and server_round > task.server_round
            if later and lock_holder(path) is not None:
                raise OvertakenError(
                    f"round {server_round} of this run is here, so round {task.server_round} is given up"
                )
