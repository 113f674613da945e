"""The optimizer, and its step without protection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from common.config import TrainSection
from common.errors import ConfigError


class PlainStep:
    """One optimizer step at a time without protection: the mean over the batch."""

    def __init__(self, optimizer: Optimizer, *, batch_size: int) -> None:
        self._optimizer = optimizer
        self._batch_size = batch_size

    def backward(self, loss: Tensor, *, sizes: Sequence[int]) -> None:
        """Add a micro-batch. loss: the sum of its records' losses."""
        torch.autograd.backward(loss / self._batch_size)

    def finish(self) -> None:
        """Step."""
        self._optimizer.step()
        self._optimizer.zero_grad()


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
