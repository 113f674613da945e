"""One task's training at a site, from the incoming adapter to what may leave."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from client.cost import Speeds
from client.dp import signal_to_noise
from client.egress import CheckedAdapter, check_adapter, check_numbers
from client.examples import ExampleStore, LocalExamples
from client.noise import Entropy
from client.site_config import SiteConfig
from client.time_limit import within_hours
from client.trainer import DpSettings, train
from common.adapter import AdapterShape, AdapterState, Float32, from_safetensors
from common.config import RunConfig
from common.errors import ShapeError, SignatureError
from common.files import Buffer
from common.frozen_part import split_adapter, untrained_tensors
from common.lora import attached, read_adapter, shape_of, write_adapter
from common.model import BaseModel, choose_device, load_base, release_base
from common.planned_model import PlannedModel
from common.records import Task

logger = logging.getLogger(__name__)

# Fewer cannot fill the large batches beside which the noise of one patient's protection is small.
FEW_PATIENTS = 500


@dataclass(frozen=True, slots=True)
class TrainedTask:
    """What may leave, and what stays: how the records were read."""

    adapter: CheckedAdapter
    numbers: Mapping[str, float]
    local: LocalExamples


class Workbench:
    """Trains tasks on one site's records. It charges nothing and keeps nothing that leaves."""

    def __init__(
        self, config: SiteConfig, *, speeds: Speeds, entropy: Entropy = os.urandom
    ) -> None:
        self._config = config
        self._store = ExampleStore(config)
        self._speeds = speeds
        self._entropy = entropy
        self._warned = False
        self._loaded = ""

    @property
    def loaded_base(self) -> str:
        """The digest of the base model that is in memory, "" when none is."""
        return self._loaded

    def release(self) -> None:
        """Let base model and records leave the memory; the next task brings them back."""
        self._store.forget()
        release_base()
        self._loaded = ""

    def load(self, task: Task, run: RunConfig) -> BaseModel:
        """Return the base model that a task names; in memory until `release`. Raises as `load_base`."""
        base = load_base(
            self._config.models[run.model.name],
            run.model,
            device=choose_device(self._config.device.name),
            expected_digest=task.base_digest,
        )
        self._loaded = base.digest
        return base

    def train(
        self,
        task: Task,
        run: RunConfig,
        dp: DpSettings | None,
        *,
        incoming: AdapterState | None,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> TrainedTask:
        """Return the outcome of a task; every check before leaving has passed.

        incoming: from `open_adapter`, frozen ranks last; None starts from a fresh one (dry run).
        on_step: is told each step done. Raises ConsiliumError.
        """
        config, policy = self._config, self._config.policy
        base = self.load(task, run)
        rank, factors = run.lora.rank, run.round.trained_factors
        trained, frozen = (None, None) if incoming is None else split_adapter(incoming, rank=rank)
        with attached(base, run.lora, trained_factors=factors, frozen=frozen) as model:
            shape = shape_of(model, run.lora, rank)
            if trained is not None:
                write_adapter(model, trained)
            local = self._store.load(base, run)
            if dp is not None and local.patients is not None:
                self._warn_of_few_patients(dp, len(local.patients), model)
            result = train(
                model,
                local.examples,
                settings=run.train,
                server_round=task.server_round,
                stream=config.site.name,
                pad_id=base.pad_id,
                device=base.device,
                dp=dp,
                patients=local.patients,
                entropy=self._entropy,
                on_step=within_hours(policy.max_hours, then=on_step),
            )
            outgoing = read_adapter(model, run.lora, rank=rank).to_safetensors()
        num_parameters = sum(parameter.numel() for parameter in base.model.parameters())
        planned = PlannedModel(base.digest, shape, num_parameters)
        self._speeds.add(planned, run, seconds=result.seconds)
        adapter = check_adapter(
            outgoing,
            shape=shape,
            max_norm=policy.max_adapter_norm,
            untrained=None if incoming is None else untrained_part(incoming, run),
        )
        numbers: dict[str, float] = {"steps": result.steps}
        if "train-loss" in policy.release_metrics and math.isfinite(result.mean_loss):
            numbers["train-loss"] = result.mean_loss
        if "train-seconds" in policy.release_metrics:
            numbers["train-seconds"] = result.seconds
        checked = check_numbers(
            numbers, released=policy.release_metrics, digits=policy.metric_digits
        )
        return TrainedTask(adapter, checked, local)

    def _warn_of_few_patients(self, dp: DpSettings, num_patients: int, model: nn.Module) -> None:
        """Say once, in the hospital's own log, that there is more noise than signal to expect."""
        if self._warned or num_patients >= FEW_PATIENTS:
            return
        self._warned = True
        dimension = sum(p.numel() for p in model.parameters() if p.requires_grad)
        ratio = signal_to_noise(
            num_units=dp.sample_rate * num_patients,
            noise_multiplier=dp.noise_multiplier,
            dimension=dimension,
        )
        logger.warning(
            "%s: %d patients, fewer than %d: a step's gradient is at the very best %.2g of its noise",
            self._config.site.name,
            num_patients,
            FEW_PATIENTS,
            ratio,
        )


def untrained_part(incoming: AdapterState, run: RunConfig) -> dict[str, Float32]:
    """Return the tensors of a task's adapter that its reply must hold as they came, by name."""
    return untrained_tensors(
        incoming, rank=run.lora.rank, trained_factors=run.round.trained_factors
    )


def open_adapter(data: Buffer, *, shape: AdapterShape, digest: str) -> AdapterState:
    """Return the adapter that came with a task, which signed its digest.

    Raises SignatureError for another one, ShapeError or ProtocolError for one that is not of `shape`, or
    not finite.
    """
    state = from_safetensors(data, shape=shape)
    if state.digest() != digest:
        raise SignatureError("the incoming adapter is not the one that the task was signed with")
    if not state.is_finite():
        raise ShapeError("the incoming adapter holds values that are not finite")
    return state
