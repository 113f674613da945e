"""Counting at a site, for a coordinator without test records: how well base and result do on the site's own.

What leaves is six numbers: how many records and answer tokens, and of both models the sum of losses and the
count of tokens that were right. No epsilon covers them. So they leave only where policy.release-metrics says
"evaluation", over records that are not trained on and not too few, and once for each run that this site
trained in: with an adapter of its own making and many questions, a coordinator could ask for one record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from client.examples import ExampleStore
from client.gate import Gate
from client.ledger import Ledger
from client.policy import check_run_uid
from client.site_config import SiteConfig
from client.training import open_adapter
from client.turn import Caller, Turn
from common.adapter import AdapterState
from common.audit_log import AuditLog
from common.config import RunConfig
from common.errors import PolicyError
from common.files import Buffer, write_atomically
from common.lora import carrying
from common.metrics import TokenSums
from common.model import choose_device, load_base
from common.record_sums import record_sums
from common.records import Task

# Records per forward pass; it changes nothing but memory.
_BATCH_SIZE = 16


class Evaluator:
    """One site's evaluations. folder: where the one of each run is noted, by the run's name."""

    def __init__(
        self,
        config: SiteConfig,
        *,
        gate: Gate,
        ledger: Ledger,
        audit: AuditLog,
        turn: Turn,
        folder: Path,
    ) -> None:
        self._config = config
        self._gate = gate
        self._ledger = ledger
        self._audit = audit
        self._turn = turn
        self._folder = folder
        self._store = ExampleStore(config)

    def count(
        self, task: Task, incoming: Buffer, signer: str, *, ends_s: float, caller: Caller
    ) -> dict[str, float]:
        """Return the sums that a task asks for, the same when the same task is asked again.

        incoming: the adapter that came with it. signer: the coordinator's key. ends_s: when its time is over
        (time.monotonic). Raises PolicyError for a second evaluation of a run or for too few records, and
        ConsiliumError as for training.
        """
        plan = self._gate.consider(task, signer=signer)
        self._check_first(task)
        adapter = open_adapter(
            incoming,
            shape=self._gate.incoming_shape(plan, base_digest=task.base_digest),
            digest=task.adapter_digest,
        )
        with self._turn.take(task, ends_s=ends_s, caller=caller) as on_step:
            # While it waited, the hospital may have declined, or another evaluation been answered.
            self._gate.consider(task, signer=signer)
            self._check_first(task)
            self._note(task)
            numbers = self._sums(task, plan.run, adapter, on_step)
            self._gate.consider(task, signer=signer)
        return numbers

    def release(self) -> None:
        """Let the test records leave the memory."""
        self._store.forget()

    def _check_first(self, task: Task) -> None:
        if not self._ledger.has_run(task.run_uid):
            raise PolicyError(
                f"run {task.run_uid} has trained nothing here: only models that this site helped to make are "
                "measured on its records"
            )
        path = self._path(task)
        if path.exists() and path.read_text(encoding="ascii") != task.task_id:
            raise PolicyError(
                f"run {task.run_uid} was evaluated here before, and once is all that a run gets: sums over "
                "the same records under many adapters would tell of single ones"
            )

    def _note(self, task: Task) -> None:
        """Write down, before any record is read, that this run has had its evaluation."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        write_atomically(self._path(task), task.task_id.encode("ascii"), mode=0o600)
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
        if split == run.data.split:
            raise PolicyError(
                f"data.evaluation-split = {split!r} is what this run trained on; name another split"
            )
        base = load_base(
            config.models[run.model.name],
            run.model,
            device=choose_device(config.device.name),
            expected_digest=task.base_digest,
        )
        examples = self._store.load(base, run, test_split=split).examples
        fewest = config.policy.min_evaluation_records
        if len(examples) < fewest:
            raise PolicyError(
                f"policy.min-evaluation-records = {fewest}: split {split!r} has {len(examples)} usable "
                "records"
            )
        before = record_sums(base.model, base, examples, batch_size=_BATCH_SIZE, on_batch=on_step)
        with carrying(base, run.lora, adapter) as model:
            after = record_sums(model, base, examples, batch_size=_BATCH_SIZE, on_batch=on_step)
        untouched, result = TokenSums.total(before), TokenSums.total(after)
        return {
            "evaluation-records": len(examples),
            "evaluation-tokens": result.tokens,
            "evaluation-nll": result.nll,
            "evaluation-correct": result.correct,
            "evaluation-base-nll": untouched.nll,
            "evaluation-base-correct": untouched.correct,
        }

    def _path(self, task: Task) -> Path:
        return self._folder / check_run_uid(task.run_uid)
