"""The local loop: some optimizer steps on one site's records. Reads like the algorithm."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from client.dp import private_steps
from client.noise import Entropy
from client.optimizer import PlainStep, make_optimizer
from client.sampling import (
    Batch,
    check_patients,
    micro_batches,
    private_batches,
    shuffled_batches,
)
from common.answer_logits import answer_logits
from common.config import TrainSection
from common.errors import PrivacyError, TrainingError
from common.metrics import record_losses
from common.prompts import Examples, collate
from common.schedule import scheduled_rate
from common.seeding import derive_seed


@dataclass(frozen=True, slots=True)
class DpSettings:
    """noise_multiplier: sigma; max_grad_norm: clipping norm; sample_rate: public q in (0, 1].

    max_records_per_patient: what a patient gives to a step at most; 0 makes records the unit.
    """

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    max_records_per_patient: int = 0


@dataclass(frozen=True, slots=True)
class TrainResult:
    """steps: optimizer steps done. mean_loss: over the records seen, NaN when none was. seconds."""

    steps: int
    mean_loss: float
    seconds: float


class Step(Protocol):
    """One optimizer step at a time: micro-batches of whole units, then the step."""

    def backward(self, loss: Tensor, *, sizes: Sequence[int]) -> None:
        """Add a micro-batch. loss: the sum of its records' losses. sizes: records of each unit."""

    def finish(self) -> None:
        """Step."""


def _as_it_is(step: Step, model: nn.Module, optimizer: Optimizer) -> Step:
    return step


def train(
    model: nn.Module,
    examples: Examples,
    *,
    settings: TrainSection,
    server_round: int,
    stream: str,
    pad_id: int,
    device: torch.device,
    dp: DpSettings | None,
    patients: Sequence[Sequence[int]] | None = None,
    entropy: Entropy = os.urandom,
    on_step: Callable[[int], None] = lambda step: None,
    around: Callable[[Step, nn.Module, Optimizer], Step] = _as_it_is,
) -> TrainResult:
    """Train the adapter on `model` for one round, in place.

    model: a lent model (common.lora.attached). examples: this site's tokenised records.
    server_round: 1 up; it places the round in the schedule. stream: names the site, so that sites
    order their records differently without DP. dp: None trains without protection.
    patients: the places of each patient's records in `examples`; given when patients are the unit.
    entropy: source of sampling and noise under DP; a test may pass another, no configuration can.
    on_step: called after each step with its number; what it raises stops the training.
    around: returns what takes the place of the round's step, so that an audit in a simulation can add
    canaries and see what the step saw; no site passes one, and no configuration can.
    Raises TrainingError when there are no examples, or the adapter is not finite or did not move;
    PrivacyError when `patients` does not fit `dp`, or the model mixes records.
    """
    if len(examples) == 0:
        raise TrainingError("no examples to train on")
    _check_unit(
        patients,
        dp=dp,
        num_examples=len(examples),
        micro_batch_size=settings.micro_batch_size,
    )
    started = time.monotonic()
    seed = derive_seed(settings.seed, "train", stream, server_round)
    # Whoever can foresee dropout's masks can undo it: under DP no seed of the run may choose them.
    mask_seed = seed if dp is None else int.from_bytes(entropy(8), "little")
    before = _trainable_copy(model)
    batches = _batches(
        len(examples), patients, settings=settings, dp=dp, seed=seed, entropy=entropy
    )
    first_step = (server_round - 1) * settings.local_steps
    total_steps = settings.rounds * settings.local_steps
    loss_sum, records_seen = 0.0, 0

    with _training_mode(model, settings, seed=mask_seed, device=device):
        optimizer = make_optimizer(model, settings, device=device)
        with _steps(model, optimizer, settings=settings, dp=dp, entropy=entropy) as own_step:
            step = around(own_step, model, optimizer)
            for index, batch in enumerate(batches):
                learning_rate = scheduled_rate(
                    first_step + index, total_steps=total_steps, settings=settings
                )
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                for piece in micro_batches(
                    batch, size=settings.micro_batch_size, length=examples.length
                ):
                    records = [examples[i] for unit in piece for i in unit]
                    inputs = collate(records, pad_id=pad_id, device=device)
                    loss = record_losses(*answer_logits(model, inputs)).sum()
                    step.backward(loss, sizes=[len(unit) for unit in piece])
                    loss_sum += float(loss.detach())
                    records_seen += len(records)
                step.finish()
                on_step(index + 1)

    _check_moved(model, before)
    return TrainResult(
        settings.local_steps,
        loss_sum / records_seen if records_seen else math.nan,
        time.monotonic() - started,
    )


def _batches(
    num_examples: int,
    patients: Sequence[Sequence[int]] | None,
    *,
    settings: TrainSection,
    dp: DpSettings | None,
    seed: int,
    entropy: Entropy,
) -> Iterator[Batch]:
    if dp is None:
        return shuffled_batches(
            num_examples, batch_size=settings.batch_size, steps=settings.local_steps, seed=seed
        )
    return private_batches(
        [[i] for i in range(num_examples)] if patients is None else patients,
        sample_rate=dp.sample_rate,
        max_records=dp.max_records_per_patient or 1,
        steps=settings.local_steps,
        entropy=entropy,
    )


def _check_unit(
    patients: Sequence[Sequence[int]] | None,
    *,
    dp: DpSettings | None,
    num_examples: int,
    micro_batch_size: int,
) -> None:
    cap = 0 if dp is None else dp.max_records_per_patient
    if (patients is not None) != (cap > 0):
        raise PrivacyError(
            f"max_records_per_patient is {cap} and patients are "
            f"{'not known' if patients is None else 'told apart'}; both or neither make them the unit"
        )
    if patients is None:
        return
    if cap > micro_batch_size:
        raise PrivacyError(
            f"privacy.max-records-per-patient = {cap} is above train.micro-batch-size = "
            f"{micro_batch_size}: a patient's records are never split, so raise the one or lower the "
            "other"
        )
    check_patients(patients, num_records=num_examples)


@contextmanager
def _steps(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    settings: TrainSection,
    dp: DpSettings | None,
    entropy: Entropy,
) -> Iterator[Step]:
    if dp is None:
        yield PlainStep(optimizer, batch_size=settings.batch_size)
        return
    with private_steps(
        model,
        optimizer,
        noise_multiplier=dp.noise_multiplier,
        max_grad_norm=dp.max_grad_norm,
        batch_size=settings.batch_size,
        entropy=entropy,
    ) as step:
        yield step


@contextmanager
def _training_mode(
    model: Any, settings: TrainSection, *, seed: int, device: torch.device
) -> Iterator[None]:
    """Dropout on and seeded, gradient checkpointing as asked; all of it undone at the end."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        model.train()
        if settings.gradient_checkpointing:
            # The reentrant form runs each layer's own backward pass, and once only.
            model.activation_checkpointing_enable({"use_reentrant": True})
            # transformers 5.23 has done so by now; a second time would leave the first one's hook behind.
            model.disable_input_require_grads()
            model.enable_input_require_grads()
        try:
            yield
        finally:
            if settings.gradient_checkpointing:
                model.disable_input_require_grads()
                model.activation_checkpointing_disable()
            # As large as the adapter, and of no more use.
            model.zero_grad(set_to_none=True)
            model.eval()


def _trainable_copy(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def _check_moved(model: nn.Module, before: list[torch.Tensor]) -> None:
    after = [p.detach() for p in model.parameters() if p.requires_grad]
    if not all(bool(p.isfinite().all()) for p in after):
        raise TrainingError("the adapter is not finite after training; lower train.learning-rate")
    if all(torch.equal(old, new) for old, new in zip(before, after, strict=True)):
        raise TrainingError("the adapter did not move; raise train.learning-rate")
