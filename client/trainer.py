"""The local loop: some optimizer steps on one site's records. Reads like the algorithm."""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from client.dp import SecureDPOptimizer, make_private, zero_record_gradients
from client.noise import Entropy
from client.sampling import micro_batches, poisson_batches, shuffled_batches
from common.config import TrainSection
from common.errors import ConfigError, TrainingError
from common.metrics import record_losses
from common.prompts import Examples, collate
from common.seeding import derive_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DpSettings:
    """noise_multiplier: sigma; max_grad_norm: clipping norm; sample_rate: public q in (0, 1]."""

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float


@dataclass(frozen=True, slots=True)
class TrainResult:
    """steps: optimizer steps done. mean_loss: over the records seen, NaN when none was. seconds."""

    steps: int
    mean_loss: float
    seconds: float


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
    entropy: Entropy = os.urandom,
    on_step: Callable[[int], None] = lambda step: None,
) -> TrainResult:
    """Train the adapter on `model` for one round, in place.

    model: a lent model (common.model.attached). examples: this site's tokenised records.
    server_round: 1 up; it places the round in the schedule. stream: names the site, so that sites
    order their records differently without DP. dp: None trains without protection.
    entropy: source of sampling and noise under DP; a test may pass another, no configuration can.
    Raises TrainingError when there are no examples, or the adapter is not finite or did not move.
    """
    if len(examples) == 0:
        raise TrainingError("no examples to train on")
    started = time.monotonic()
    seed = derive_seed(settings.seed, "train", stream, server_round)
    # Whoever can foresee dropout's masks can undo it: under DP no seed of the run may choose them.
    mask_seed = seed if dp is None else int.from_bytes(entropy(8), "little")
    before = _trainable_copy(model)
    first_step = (server_round - 1) * settings.local_steps
    total_steps = settings.rounds * settings.local_steps
    loss_sum, records_seen = 0.0, 0

    with _training_mode(model, settings, seed=mask_seed, device=device):
        optimizer = make_optimizer(model, settings, device=device)
        step_model: nn.Module = model
        private: SecureDPOptimizer | None = None
        if dp is None:
            batches = shuffled_batches(
                len(examples),
                batch_size=settings.batch_size,
                steps=settings.local_steps,
                seed=seed,
            )
        else:
            step_model, private = make_private(
                model,
                optimizer,
                noise_multiplier=dp.noise_multiplier,
                max_grad_norm=dp.max_grad_norm,
                batch_size=settings.batch_size,
                entropy=entropy,
            )
            batches = poisson_batches(
                len(examples),
                sample_rate=dp.sample_rate,
                steps=settings.local_steps,
                entropy=entropy,
            )
        try:
            for index, batch in enumerate(batches):
                learning_rate = scheduled_rate(
                    first_step + index, total_steps=total_steps, settings=settings
                )
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                pieces = micro_batches(
                    batch,
                    size=settings.micro_batch_size,
                    length=examples.length,
                )
                for number, piece in enumerate(pieces):
                    if private is not None:
                        private.signal_skip_step(do_skip=number < len(pieces) - 1)
                    if piece:
                        inputs = collate([examples[i] for i in piece], pad_id=pad_id, device=device)
                        logits = step_model(
                            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask
                        ).logits
                        loss = record_losses(logits, inputs.labels).sum()
                        # Under DP the optimizer divides by the batch size, after clipping.
                        torch.autograd.backward(
                            loss if private is not None else loss / settings.batch_size
                        )
                        loss_sum += float(loss.detach())
                        records_seen += len(piece)
                    elif private is not None:
                        zero_record_gradients(private)
                    if private is not None:
                        private.step()
                        private.zero_grad()
                if private is None:
                    optimizer.step()
                    optimizer.zero_grad()
                on_step(index + 1)
        finally:
            if private is not None:
                step_model.remove_hooks()  # type: ignore[operator]

    _check_moved(model, before)
    mean_loss = loss_sum / records_seen if records_seen else math.nan
    return TrainResult(settings.local_steps, mean_loss, time.monotonic() - started)


def scheduled_rate(step: int, *, total_steps: int, settings: TrainSection) -> float:
    """Return the learning rate of a step, counted from 0 over the whole run.

    Rises over ceil(warmup_ratio * total_steps) steps, then stays (constant) or falls towards 0,
    which it would reach one step after the last (linear).
    """
    warmup = math.ceil(settings.warmup_ratio * total_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    return settings.learning_rate * (total_steps - step) / (total_steps - warmup)


def make_optimizer(model: nn.Module, settings: TrainSection, *, device: torch.device) -> Optimizer:
    """Return the optimizer of the trainable parameters. Raises ConfigError where it cannot run."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return SGD(parameters, lr=rate, weight_decay=decay)
    if settings.optimizer == "adamw":
        return AdamW(parameters, lr=rate, weight_decay=decay)
    if device.type != "cuda":
        raise ConfigError(
            f"train.optimizer = 'paged-adamw-8bit' needs CUDA and this device is {device.type!r}; "
            "use 'adamw'"
        )
    from bitsandbytes.optim import PagedAdamW8bit

    paged: Optimizer = PagedAdamW8bit(parameters, lr=rate, weight_decay=decay)
    return paged


@contextmanager
def _training_mode(
    model: Any, settings: TrainSection, *, seed: int, device: torch.device
) -> Iterator[None]:
    """Dropout on and seeded, gradient checkpointing as asked; all of it undone at the end."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), warnings.catch_warnings():
        # The first layer's input needs no gradient; Opacus's hook on it wants only the output's.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        torch.manual_seed(seed)
        model.train()
        if settings.gradient_checkpointing:
            # Opacus's hooks see each layer once only with the reentrant form.
            model.activation_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        try:
            yield
        finally:
            if settings.gradient_checkpointing:
                model.disable_input_require_grads()
                model.activation_checkpointing_disable()
            model.eval()


def _trainable_copy(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def _check_moved(model: nn.Module, before: list[torch.Tensor]) -> None:
    after = [p.detach() for p in model.parameters() if p.requires_grad]
    if not all(bool(p.isfinite().all()) for p in after):
        raise TrainingError("the adapter is not finite after training; lower train.learning-rate")
    if all(torch.equal(old, new) for old, new in zip(before, after, strict=True)):
        raise TrainingError("the adapter did not move; raise train.learning-rate")
