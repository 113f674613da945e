"""Counting at a site, for a coordinator without test records: how well base and result do on the site's own.

What leaves is six numbers: how many records and answer tokens, and of both models the sum of losses and the
count of tokens that were right. No epsilon covers them. So they leave only where policy.release-metrics says
"evaluation", over records that are not trained on and not too few, once for each run that this site trained
in, and for so many runs in all: with an adapter of its own making and many questions, a coordinator could ask
for one record.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial

from client.egress import check_numbers
from client.evaluations import Evaluations
from client.examples import ExampleStore
from client.gate import Gate
from client.ledger import Ledger
from client.site_config import SiteConfig
from client.time_limit import within_hours
from client.trained_splits import TrainedSplits
from client.training import Workbench, open_adapter
from client.turn import Caller, Turn
from common.adapter import AdapterState
from common.audit_log import AuditLog
from common.config import RunConfig
from common.errors import PolicyError
from common.files import Buffer
from common.lora import carrying
from common.metrics import TokenSums
from common.record_sums import record_sums
from common.records import Task

# Records per forward pass, where as many fit into memory for training; it changes nothing but memory.
_MAX_BATCH_SIZE = 16


class Evaluator:
    """One site's evaluations."""

    def __init__(
        self,
        config: SiteConfig,
        *,
        gate: Gate,
        ledger: Ledger,
        audit: AuditLog,
        turn: Turn,
        workbench: Workbench,
        evaluations: Evaluations,
        splits: TrainedSplits,
    ) -> None:
        self._config = config
        self._gate = gate
        self._ledger = ledger
        self._audit = audit
        self._turn = turn
        self._workbench = workbench
        self._evaluations = evaluations
        self._splits = splits
        self._store = ExampleStore(config)

    def count(
        self, task: Task, incoming: Buffer, signer: str, *, ends_s: float, caller: Caller
    ) -> dict[str, float]:
        """Return the sums that a task asks for, the same when the same task is asked again.

        incoming: the adapter that came with it. signer: the coordinator's key. ends_s: when its time is over
        (time.monotonic). Raises PolicyError for a second evaluation of a run, one too many in all, records
        that the run trained on, or too few, and ConsiliumError as for training.
        """
        plan = self._gate.consider(task, signer=signer)
        self._find(task)
        adapter = open_adapter(
            incoming,
            shape=self._gate.incoming_shape(plan, base_digest=task.base_digest),
            digest=task.adapter_digest,
        )
        with self._turn.take(task, ends_s=ends_s, caller=caller) as on_step:
            # While it waited, the hospital may have declined, or another evaluation been answered.
            self._gate.consider(task, signer=signer)
            numbers = self._find(task)
            if numbers is None:
                self._note(task)
                numbers = self._leaving(self._sums(task, plan.run, adapter, on_step))
                self._evaluations.keep(task, numbers)
            self._gate.consider(task, signer=signer)
        return numbers

    def release(self) -> None:
        """Let the test records leave the memory."""
        self._store.forget()

    def _find(self, task: Task) -> dict[str, float] | None:
        """Return what the task was answered before, None where it may be counted now."""
        if not self._ledger.has_run(task.run_uid):
            raise PolicyError(
                f"run {task.run_uid} has trained nothing here: only models that this site helped to make are "
                "measured on its records"
            )
        trained, counted = self._splits.of(task.run_uid), self._config.data.evaluation_split
        # "" trains on the rows of every split. What the task says of it, the policy has looked at.
        if trained & {counted, ""}:
            raise PolicyError(
                f"data.evaluation-split = {counted!r} is part of what run {task.run_uid} trained on here, "
                "whatever its task says now; only records of another split are counted"
            )
        return self._evaluations.find(task)

    def _leaving(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the sums as they may leave: what is kept need not be more exact."""
        policy = self._config.policy
        return check_numbers(sums, released=policy.release_metrics, digits=policy.metric_digits)

    def _note(self, task: Task) -> None:
        """Write down, before any record is read, that this run has had its evaluation."""
        self._evaluations.note(task)
        self._audit.append(
            "evaluating",
            task_id=task.task_id,
            run=task.run_uid,
            round=task.server_round,
            ledger=asdict(self._ledger.head()),
        )

    def _sums(
        self, task: Task, run: RunConfig, adapter: AdapterState, on_step: Callable[[int], None]
    ) -> dict[str, float]:
        config = self._config
        split = config.data.evaluation_split
        base = self._workbench.load(task, run)
        local = self._store.load(base, run, test_split=split)
        examples, patients = local.examples, local.patients
        fewest = config.policy.min_evaluation_records
        if len(examples if patients is None else patients) < fewest:
            of = "" if patients is None else f" of {len(patients)} patients"
            raise PolicyError(
                f"policy.min-evaluation-records = {fewest}: split {split!r} has {len(examples)} usable "
                f"records{of}"
            )
        steps = itertools.count(1)
        tell = within_hours(config.policy.max_hours, then=on_step)
        count_in = partial(
            record_sums,
            base=base,
            examples=examples,
            batch_size=min(run.train.micro_batch_size, _MAX_BATCH_SIZE),
            on_batch=lambda done: tell(next(steps)),
        )
        before = count_in(base.model)
        with carrying(base, run.lora, adapter) as model:
            after = count_in(model)
        untouched, result = TokenSums.total(before), TokenSums.total(after)
        return {
            "evaluation-records": len(examples),
            "evaluation-tokens": result.tokens,
            "evaluation-nll": result.nll,
            "evaluation-correct": result.correct,
            "evaluation-base-nll": untouched.nll,
            "evaluation-base-correct": untouched.correct,
        }
