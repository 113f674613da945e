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
from dataclasses import dataclass
from pathlib import Path

from common.errors import BusyError, CancelledError, ExpiredError, OvertakenError
from common.locks import LockHeldError, hold_lock, lock_holder
from common.records import Task

# So often whoever waits is looked for.
_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class Caller:
    """Who waits for a task's answer.

    is_there: False once nobody does any more, or the hospital wants the task stopped. waits: behind another
    task; one that does not is told of it. on_begin: is told when the task's turn has come; on_step: each
    step done.
    """

    is_there: Callable[[], bool] = lambda: True
    waits: bool = True
    on_begin: Callable[[Task], None] = lambda task: None
    on_step: Callable[[int], None] = lambda step: None


PATIENT = Caller()


class Turn:
    """Whose turn it is to train at a site, as locks in its state folder."""

    def __init__(self, folder: Path) -> None:
        # What this process trains now.
        self._current: Task | None = None
        self._lock = folder / "turn.lock"
        self._waiting = folder / "waiting"
        self._waiting.mkdir(parents=True, exist_ok=True, mode=0o700)

    def require_free(self, task: Task, caller: Caller) -> None:
        """Raise BusyError for a caller that does not wait, when this process trains another task.

        A later round of the same run takes the other's place, so it need not be turned away.
        """
        current = self._current
        if caller.waits or current is None:
            return
        if current.run_uid == task.run_uid and current.server_round < task.server_round:
            return
        raise BusyError(
            f"this site trains round {current.server_round} of run {current.run_uid[:8]}; ask again when "
            "that is done"
        )

    @contextmanager
    def take(
        self, task: Task, *, ends_s: float, caller: Caller = PATIENT
    ) -> Iterator[Callable[[int], None]]:
        """Wait for one's turn and have it for as long as the block runs.

        ends_s: when the task's time is over (time.monotonic). Yields what is to be told every step: it
        raises OvertakenError when a later round's task waits, ExpiredError when time is over, and
        CancelledError when the caller is gone. Raises the last two also when the turn does not come before,
        and BusyError as `require_free`.
        """
        own = self._waiting / f"{task.run_uid}.{task.server_round}"
        with ExitStack() as turn:
            with ExitStack() as waiting:
                # The lock says that somebody waits: who was killed while waiting holds none. Two that wait
                # for the same round need to say it only once.
                with suppress(LockHeldError):
                    waiting.enter_context(hold_lock(own))
                    waiting.callback(own.unlink, missing_ok=True)
                self._wait(turn, task, ends_s=ends_s, caller=caller)
            self._current = task
            turn.callback(self._leave)
            caller.on_begin(task)
            yield lambda step: self._check(step, task, ends_s=ends_s, caller=caller)

    def _wait(self, turn: ExitStack, task: Task, *, ends_s: float, caller: Caller) -> None:
        while True:
            try:
                turn.enter_context(hold_lock(self._lock, wait_s=_LOOK_S))
                return
            except LockHeldError as error:
                # Two that came at once: only now is it known whose turn it is.
                self.require_free(task, caller)
                if not caller.is_there():
                    raise CancelledError("nobody waits for this task any more") from None
                if time.monotonic() > ends_s:
                    raise ExpiredError(
                        f"another task is being trained here (process {error.pid}), and this one's time "
                        "was over before its turn came"
                    ) from None

    def _leave(self) -> None:
        self._current = None

    def _check(self, step: int, task: Task, *, ends_s: float, caller: Caller) -> None:
        caller.on_step(step)
        if not caller.is_there():
            raise CancelledError(
                f"stopped after step {step} of round {task.server_round}: whoever asked for it is gone, or "
                "it was cancelled here; what it has cost stays charged, and asked again it begins anew"
            )
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
