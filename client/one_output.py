"""From a task that is permitted to the one output that it ever has: charge, train, keep, release.

Each step is on disk before the next begins, so that whatever stops in between, the task asked again goes on
where it was: charged once, and one output at most leaves.
"""

from __future__ import annotations

import logging
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from client.egress import CheckedAdapter, check_adapter
from client.gate import Gate
from client.ledger import Ledger, LedgerRow
from client.outbox import KEPT_ROUNDS, Outbox, Outcome
from client.plan import TaskPlan
from client.replies import FailedTaskError, in_words
from client.site_config import SiteConfig
from client.trained_splits import TrainedSplits
from client.training import Workbench, open_adapter, untrained_part
from client.turn import Caller, Turn
from common.adapter import AdapterState
from common.audit_log import AuditLog
from common.errors import (
    BudgetError,
    CancelledError,
    DataError,
    DiskError,
    ExpiredError,
    ModelError,
    OvertakenError,
    SignatureError,
)
from common.files import Buffer, is_disk_full
from common.privacy import compose_epsilon
from common.records import PrivacyRow, Task, error_code

# For the lines and entries that a task adds to the site's own files.
_SPARE_BYTES = 1 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training task's reply carries."""

    adapter: CheckedAdapter
    numbers: Mapping[str, float]
    privacy: PrivacyRow


class OneOutput:
    """One site's tasks, each with one charge and one output."""

    def __init__(
        self,
        config: SiteConfig,
        *,
        gate: Gate,
        ledger: Ledger,
        audit: AuditLog,
        outbox: Outbox,
        turn: Turn,
        workbench: Workbench,
        splits: TrainedSplits,
    ) -> None:
        self._config = config
        self._gate = gate
        self._ledger = ledger
        self._audit = audit
        self._outbox = outbox
        self._turn = turn
        self._workbench = workbench
        self._splits = splits

    def of(
        self, task: Task, incoming: Buffer, signer: str, *, ends_s: float, caller: Caller
    ) -> Trained:
        """Return a task's one output, trained now or before.

        incoming: the adapter that came with it. signer: the coordinator's key. ends_s: when its time is over
        (time.monotonic). Raises ConsiliumError for what stands in the way, FailedTaskError for a task whose
        one output is that it failed.
        """
        plan = self._gate.consider(task, signer=signer)
        self._record_task(task)
        # Before the charge: what cannot be trained from must not cost the hospital anything.
        shape = self._gate.planned(plan, base_digest=task.base_digest).shape
        open_incoming = partial(
            open_adapter,
            incoming,
            shape=self._gate.incoming_shape(plan, base_digest=task.base_digest),
            digest=task.adapter_digest,
        )
        adapter = None if self._outbox.holds(task.task_id) else open_incoming()
        self._check_space(task, adapter_bytes=len(incoming))
        with self._turn.take(task, ends_s=ends_s, caller=caller) as on_step:
            # Again: while it waited, the hospital may have declined, or another task taken the last steps.
            plan = self._gate.consider(task, signer=signer)
            self._gate.charge(plan, signer=signer)
            self._settle_overtaken(task)
            row = self._ledger.find(task.task_id)
            outcome = self._outbox.find(task.task_id)
            if outcome is None:
                _check_not_answered(row)
                self._splits.note(task.run_uid, plan.run.data.split)
                self._record_training(task, plan)
                outcome = self._train_once(task, plan, adapter or open_incoming(), on_step=on_step)
            # And again: meanwhile the hospital may have declined, left the coordinator or stopped the task.
            self._gate.consider(task, signer=signer)
            if not caller.is_there():
                raise CancelledError(
                    "nobody waits for this task any more, or it was stopped here; its one output is kept"
                )
            self._ledger.release(task.task_id)
            self._forget_old(task)
        if outcome.failure:
            raise FailedTaskError(outcome.failure)
        untrained = {}
        if plan.run.round.trained_factors != "both":
            untrained = untrained_part(adapter or open_incoming(), plan.run)
        # The file may have been exchanged since it was written.
        leaving = check_adapter(
            outcome.adapter,
            shape=shape,
            max_norm=self._config.policy.max_adapter_norm,
            untrained=untrained,
        )
        privacy = privacy_row(plan, rows=self._gate.own_rows(task.run_uid))
        return Trained(leaving, outcome.numbers, privacy)

    def _check_space(self, task: Task, *, adapter_bytes: int) -> None:
        """What cannot be written down afterwards need not be trained."""
        if self._outbox.holds(task.task_id):
            return
        state = self._config.folder / "state"
        needed, free = 3 * adapter_bytes + _SPARE_BYTES, shutil.disk_usage(state).free
        if free < needed:
            raise DiskError(
                f"{state} has {free:,} bytes free, and this task needs {needed:,}; free some space, and the "
                "task goes on when it is asked again"
            )

    def _settle_overtaken(self, task: Task) -> None:
        """Close what earlier rounds of this run were charged for and never answered: nobody asks for it."""
        for row in self._gate.own_rows(task.run_uid):
            if row.state == "reserved" and row.server_round < task.server_round:
                self._audit.append(
                    "overtaken", task_id=row.task_id, run=row.run_uid, round=row.server_round
                )
                self._outbox.store(row.task_id, Outcome(b"", {}, failure=OvertakenError.code))
                self._ledger.release(row.task_id)

    def _forget_old(self, task: Task) -> None:
        """Keep the replies that a coordinator may still ask for, going on from an earlier checkpoint."""
        for row in self._gate.own_rows(task.run_uid):
            if row.server_round <= task.server_round - KEPT_ROUNDS:
                self._outbox.forget(row.task_id, failure=OvertakenError.code)

    def _train_once(
        self,
        task: Task,
        plan: TaskPlan,
        adapter: AdapterState,
        *,
        on_step: Callable[[int], None],
    ) -> Outcome:
        """Return what a task gave, on disk: an adapter, or that it failed.

        That it failed is an answer too, which depends on records and noise: asked again, the task must not be
        drawn afresh, or whoever asks often enough averages the noise away under one charge. Raises what
        goes wrong before anything is drawn, and what says nothing of it: that time, turn or disk are gone.
        """
        try:
            trained = self._workbench.train(
                task, plan.run, plan.dp, incoming=adapter, on_step=on_step
            )
            outcome = Outcome(trained.adapter.data, trained.numbers)
        except (
            DataError, ModelError, SignatureError, ExpiredError, OvertakenError, CancelledError,
        ):  # fmt: skip
            raise
        except Exception as error:
            if is_disk_full(error):
                raise
            logger.error("task %s failed: %s", task.task_id[:12], in_words(error))
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.debug("where task %s failed:\n%s", task.task_id[:12], frames)
            outcome = Outcome(b"", {}, failure=error_code(error))
        return self._outbox.store(task.task_id, outcome)

    def _record_task(self, task: Task) -> None:
        self._audit.append(
            "task",
            task_sha256=task.sha256,
            task_id=task.task_id,
            run=task.run_uid,
            round=task.server_round,
            attempt=task.attempt,
            coordinator_audit=asdict(task.audit_head),
        )

    def _record_training(self, task: Task, plan: TaskPlan) -> None:
        """Every time that records are opened is on record, whatever becomes of it."""
        charge = plan.charge
        self._audit.append(
            "training",
            task_id=task.task_id,
            run=task.run_uid,
            round=task.server_round,
            unit=charge.unit,
            noise_multiplier=charge.steps.noise_multiplier,
            sample_rate=charge.steps.sample_rate,
            steps=charge.steps.steps,
            ledger=asdict(self._ledger.head()),
        )


def _check_not_answered(row: LedgerRow | None) -> None:
    if row is not None and row.state == "released":
        raise BudgetError(
            f"task {row.task_id[:12]} was answered, and its reply is gone from state/outbox; a second one "
            "would cost a budget of its own. Restore the outbox from its backup"
        )


def privacy_row(plan: TaskPlan, *, rows: Sequence[LedgerRow]) -> PrivacyRow:
    """Return what some charges of a run cost by themselves, at the delta that the run asked for."""
    privacy, dp = plan.run.privacy, plan.dp
    return PrivacyRow(
        unit=privacy.unit,
        epsilon=compose_epsilon(
            [row.steps for row in rows],
            delta=privacy.target_delta,
            accountant=privacy.accountant,
        ),
        delta=privacy.target_delta,
        noise_multiplier=0.0 if dp is None else dp.noise_multiplier,
        sample_rate=1.0 if dp is None else dp.sample_rate,
        steps=sum(row.steps.steps for row in rows),
    )
