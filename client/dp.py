"""DP-SGD on an adapter: Opacus's per-sample gradients, our noise.

DP-SGD (Abadi et al. 1607.00133, algorithm 1) with two public constants in place of what would leak the
number of records: the sampling rate and the divisor. Opacus's hooks give each record's gradient (for
LoRA faster than ghost clipping), its DPOptimizer clips and sums them.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import nn
from torch.optim import Optimizer

from client.noise import Entropy, secure_normal
from common.errors import PrivacyError


class SecureDPOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus ships no types
    """Opacus's DPOptimizer whose noise comes from the operating system's entropy.

    A record whose gradient is not finite counts as zero: its influence stays bounded, and the step
    goes on.
    """

    def __init__(self, optimizer: Optimizer, *, entropy: Entropy, **settings: Any) -> None:
        super().__init__(optimizer, **settings)
        self._entropy = entropy

    def clip_and_accumulate(self) -> None:
        """Clip each record's gradient to max_grad_norm and add it to `summed_grad`."""
        gradients = self.grad_samples
        finite = torch.ones(len(gradients[0]), dtype=torch.bool, device=gradients[0].device)
        for gradient in gradients:
            finite &= gradient.flatten(1).isfinite().all(dim=1)
        if not bool(finite.all()):
            for gradient in gradients:
                gradient[~finite] = 0
        super().clip_and_accumulate()

    def add_noise(self) -> None:
        """Set `grad` to the clipped sum plus N(0, (noise_multiplier * max_grad_norm)^2)."""
        std = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            total = parameter.summed_grad
            _check_processed_flag(total)
            noise = secure_normal(total.shape, std=std, entropy=self._entropy)
            parameter.grad = (total + noise.to(total.device, total.dtype)).view_as(parameter)
            _mark_as_processed(total)


def make_private(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    noise_multiplier: float,
    max_grad_norm: float,
    batch_size: int,
    entropy: Entropy = os.urandom,
) -> tuple[GradSampleModule, SecureDPOptimizer]:
    """Return model and optimizer wired for DP-SGD.

    batch_size: the public divisor of the noisy sum (the expected batch size).
    entropy: a test may pass another source, no configuration can.
    Raises PrivacyError when the noise multiplier is not above 0, or a trainable parameter is not
    part of a LoRA layer.
    """
    if not noise_multiplier > 0:
        raise PrivacyError(
            f"noise multiplier {noise_multiplier} gives no privacy; it must be above 0"
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_A." not in name and ".lora_B." not in name:
            raise PrivacyError(
                f"{name} is trainable and has no per-record gradient under LoRA; turn off DoRA, "
                "modules_to_save and LoRA on embeddings"
            )
    private_model = GradSampleModule(model, batch_first=True, loss_reduction="sum", strict=False)
    private_optimizer = SecureDPOptimizer(
        optimizer,
        entropy=entropy,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        expected_batch_size=batch_size,
        # Losses are summed over records; "mean" here divides the noisy sum once by the constant.
        loss_reduction="mean",
    )
    return private_model, private_optimizer


def zero_record_gradients(optimizer: SecureDPOptimizer) -> None:
    """Give every parameter the per-record gradients of an empty batch: zero rows."""
    for parameter in optimizer.params:
        parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
