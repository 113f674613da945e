"""The heart of a hospital: verify, policy, ledger, data, train, egress, signed reply.

`Site.answer` is the one door: an envelope in, an envelope out. It is the same code in a hospital's
agent and in a simulation, where a site is a folder laid out exactly like a hospital's:

    site.toml   keys/signing.pem   state/ledger.sqlite   state/outbox/   (and the data, where it says)
"""

from __future__ import annotations

import logging
import math
import time
import traceback
import uuid
from collections.abc import Mapping
from pathlib import Path

from client.egress import check_adapter, check_numbers
from client.ledger import Ledger, LedgerRow
from client.outbox import Outbox, Outcome
from client.policy import check_task
from client.site_config import SiteConfig, load_site_config
from client.trainer import DpSettings, train
from common.adapter import AdapterShape, AdapterState, digest_safetensors, from_safetensors
from common.config import RunConfig
from common.dataset import Columns, load_records
from common.errors import BudgetError, ConsiliumError, ShapeError, SignatureError
from common.model import (
    BaseModel,
    attached,
    choose_device,
    load_base,
    read_adapter,
    shape_of,
    write_adapter,
)
from common.privacy import (
    GaussianSteps,
    calibrate_noise,
    public_sample_rate,
)
from common.prompts import Examples, resolve_template, tokenize_all
from common.records import (
    Envelope,
    PrivacyRow,
    Reply,
    Task,
    error_reply,
    open_task,
    seal_reply,
)
from common.signing import SigningKey

logger = logging.getLogger(__name__)


class Site:
    """One hospital's own side, opened from its folder."""

    def __init__(self, config: SiteConfig, key: SigningKey) -> None:
        self.config = config
        self._key = key
        state = config.folder / "state"
        self._ledger = Ledger(state / "ledger.sqlite")
        self._outbox = Outbox(state / "outbox")
        self._examples: tuple[tuple[str, int, str, str, int], Examples] | None = None

    @classmethod
    def open(cls, folder: Path) -> Site:
        """Return the site of a folder. Raises ConfigError when its site.toml or key is unusable."""
        config = load_site_config(folder)
        return cls(config, SigningKey.load(config.signing_key_path))

    def answer(self, envelope: Envelope, *, now_s: float | None = None) -> Envelope:
        """Return the signed reply to a task.

        now_s: Unix seconds; the clock when None.
        Whatever goes wrong after the task is known to be the coordinator's leaves as a code and a
        correlation id. Raises SignatureError or ProtocolError, and answers nothing, before that.
        """
        now_s = time.time() if now_s is None else now_s
        task = open_task(
            envelope,
            public_hex=self.config.coordinator.public_key,
            site=self.config.site.name,
            now_s=now_s,
        )
        try:
            if task.kind == "describe":
                return seal_reply(self._describe(task), self._key)
            reply, adapter = self._train(task, envelope.adapter)
            return seal_reply(reply, self._key, adapter=adapter)
        except Exception as error:
            # The text may speak of the hospital's own: it stays in the hospital's log.
            correlation_id = uuid.uuid4().hex[:12]
            text = str(error) if isinstance(error, ConsiliumError) else type(error).__name__
            logger.error("task refused or failed [%s]: %s", correlation_id, text)
            # Frames show code, not values: a third party's message may quote a record.
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.debug("where [%s]:\n%s", correlation_id, frames)
            failed = error_reply(
                task, site=self.config.site.name, error=error, correlation_id=correlation_id
            )
            return seal_reply(failed, self._key)

    def _describe(self, task: Task) -> Reply:
        numbers = {
            "declared-size": self.config.data.declared_size,
            "max-rank": self.config.policy.max_rank,
        }
        return self._reply(task, numbers=numbers)

    def _train(self, task: Task, incoming: bytes) -> tuple[Reply, bytes]:
        run = check_task(task, site=self.config)
        dp = self._dp_settings(run)
        charge = self._charge(task, run, dp)
        row = self._reserve(charge, run)
        if row.without_state != charge:
            raise BudgetError(
                f"task {task.task_id[:12]} was charged as {row.without_state} and would now be trained "
                f"as {charge}; site.toml changed under a run, so let it begin anew"
            )
        outcome = self._outbox.find(task.task_id)
        if outcome is None:
            if row.state == "released":
                raise BudgetError(
                    f"task {task.task_id[:12]} was answered, and its reply is gone from state/outbox; a "
                    "second one would cost a budget of its own. Restore the outbox from its backup"
                )
            outcome = self._outbox.store(task.task_id, self._run_training(task, run, dp, incoming))
        self._ledger.release(task.task_id)
        reply = self._reply(
            task,
            numbers=outcome.numbers,
            adapter=outcome.adapter,
            privacy=self._privacy_row(task, run, dp),
        )
        logger.info(
            "run %s round %d: reply of %d adapter bytes",
            task.run_uid,
            task.server_round,
            len(outcome.adapter),
        )
        return reply, outcome.adapter

    def _dp_settings(self, run: RunConfig) -> DpSettings | None:
        """The run's noise at this site, from public constants only, before any record is read."""
        if not run.use_dp:
            return None
        privacy = run.privacy
        rate = public_sample_rate(
            batch_size=run.train.batch_size, declared_size=self.config.data.declared_size
        )
        if isinstance(privacy.noise_multiplier, str):
            steps = run.total_steps
            inputs = (privacy.target_epsilon, privacy.target_delta, rate, steps, privacy.accountant)
            noise = self._ledger.calibration(
                repr(inputs),
                lambda: calibrate_noise(
                    target_epsilon=privacy.target_epsilon,
                    delta=privacy.target_delta,
                    sample_rate=rate,
                    steps=steps,
                    accountant=privacy.accountant,
                ),
            )
        else:
            noise = float(privacy.noise_multiplier)
        return DpSettings(noise, privacy.max_grad_norm, rate)

    def _charge(self, task: Task, run: RunConfig, dp: DpSettings | None) -> LedgerRow:
        """What this task costs, as the ledger will say it."""
        steps = (
            GaussianSteps(dp.noise_multiplier, dp.sample_rate, run.train.local_steps)
            if dp is not None
            else GaussianSteps(0.0, 1.0, run.train.local_steps)
        )
        return LedgerRow(
            task_id=task.task_id,
            run_uid=task.run_uid,
            dataset=self.config.data.name,
            unit=run.privacy.unit,
            server_round=task.server_round,
            steps=steps,
        )

    def _reserve(self, charge: LedgerRow, run: RunConfig) -> LedgerRow:
        """The row that stands for this task: the one it has already, else a new one."""
        return self._ledger.reserve(
            charge,
            planned_steps=run.total_steps,
            delta=self.config.data.delta,
            max_epsilon=self.config.policy.max_epsilon,
            accountant=run.privacy.accountant,
        )

    def _run_training(
        self, task: Task, run: RunConfig, dp: DpSettings | None, incoming: bytes
    ) -> Outcome:
        base = load_base(
            self.config.models[run.model.name],
            run.model,
            device=choose_device(self.config.device.name),
            expected_digest=task.base_digest,
        )
        with attached(base, run.lora) as model:
            shape = shape_of(model, run.lora, run.lora.rank)
            write_adapter(model, _open_adapter(incoming, shape=shape, digest=task.adapter_digest))
            examples = self._load_examples(base, run)
            result = train(
                model,
                examples,
                settings=run.train,
                server_round=task.server_round,
                stream=self.config.site.name,
                pad_id=base.pad_id,
                device=base.device,
                dp=dp,
            )
            outgoing = read_adapter(model, run.lora, rank=run.lora.rank).to_safetensors()
        check_adapter(outgoing, shape=shape)
        released = self.config.policy.release_metrics
        numbers: dict[str, float] = {"steps": result.steps}
        if "train-loss" in released and math.isfinite(result.mean_loss):
            numbers["train-loss"] = result.mean_loss
        if "train-seconds" in released:
            numbers["train-seconds"] = round(result.seconds, 1)
        return Outcome(outgoing, check_numbers(numbers, released=released))

    def _load_examples(self, base: BaseModel, run: RunConfig) -> Examples:
        """This site's records as tokens; kept between rounds."""
        data = run.data
        modified = self._modified_ns()
        key = (data.prompt_template, data.max_length, data.split, base.digest, modified)
        if self._examples is not None and self._examples[0] == key:
            return self._examples[1]
        columns = self.config.data.columns
        records = load_records(
            self.config.data_path,
            columns=Columns(columns.instruction, columns.input, columns.output, columns.split),
            split=data.split,
        )
        examples = tokenize_all(
            records.prompts,
            tokenizer=base.tokenizer,
            template=resolve_template(data.prompt_template),
            max_length=data.max_length,
        )
        self._examples = (key, examples)
        return examples

    def _modified_ns(self) -> int:
        """When the data set last changed; 0 where it cannot be asked (loading will say why)."""
        path = self.config.data_path
        try:
            return max(part.stat().st_mtime_ns for part in (path, *path.glob("*")))
        except OSError:
            return 0

    def _privacy_row(self, task: Task, run: RunConfig, dp: DpSettings | None) -> PrivacyRow:
        dataset, privacy = self.config.data.name, run.privacy
        rows = [row for row in self._ledger.rows(dataset) if row.run_uid == task.run_uid]
        return PrivacyRow(
            unit=privacy.unit,
            epsilon=self._ledger.spent(
                dataset,
                delta=privacy.target_delta,
                accountant=privacy.accountant,
                run_uid=task.run_uid,
            ),
            delta=privacy.target_delta,
            noise_multiplier=0.0 if dp is None else dp.noise_multiplier,
            sample_rate=1.0 if dp is None else dp.sample_rate,
            steps=sum(row.steps.steps for row in rows),
        )

    def _reply(
        self,
        task: Task,
        *,
        numbers: Mapping[str, float] | None = None,
        adapter: bytes = b"",
        privacy: PrivacyRow | None = None,
    ) -> Reply:
        return Reply(
            site=self.config.site.name,
            run_uid=task.run_uid,
            server_round=task.server_round,
            attempt=task.attempt,
            task_sha256=task.sha256,
            adapter_digest=digest_safetensors(adapter) if adapter else "",
            numbers=check_numbers(numbers or {}, released=self.config.policy.release_metrics),
            privacy=privacy,
        )


def _open_adapter(data: bytes, *, shape: AdapterShape, digest: str) -> AdapterState:
    """Return the adapter that came with a task, which signed its digest."""
    state = from_safetensors(data, shape=shape)
    if state.digest() != digest:
        raise SignatureError("the incoming adapter is not the one that the task was signed with")
    if not state.is_finite():
        raise ShapeError("the incoming adapter holds values that are not finite")
    return state
