"""One training step in six ways, over the same model and batch: plain, ours, and what Opacus offers.

Each arm is a context that makes the model ready, yields a function that takes one step of one
micro-batch, and leaves the model as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

import client.dp
from client.dp import private_steps
from client.optimizer import PlainStep
from common.answer_logits import answer_logits
from common.metrics import record_losses
from common.prompts import Batch

Step = Callable[[], None]

SIGMA = 1.0
CLIP = 1.0
# So small that a bench's thousandth step works on the numbers of its first.
_LEARNING_RATE = 1e-9


@dataclass(slots=True)
class Work:
    """What every arm does: one micro-batch on a lent model. noise_s: spent on noise so far."""

    model: nn.Module
    batch: Batch
    device: torch.device
    noise_s: float = 0.0

    @property
    def num_records(self) -> int:
        """Records of the micro-batch."""
        return len(self.batch.input_ids)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The adapter."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def losses(self, model: nn.Module) -> Tensor:
        """Return each record's loss."""
        return record_losses(*answer_logits(model, self.batch))

    def optimizer(self) -> AdamW:
        """Return the optimizer that every arm steps."""
        return AdamW(self.parameters, lr=_LEARNING_RATE)

    def now(self) -> float:
        """Return seconds, when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@contextmanager
def plain(work: Work) -> Iterator[Step]:
    """The step without protection."""
    steps = PlainStep(work.optimizer(), batch_size=work.num_records)

    def step() -> None:
        steps.backward(work.losses(work.model).sum(), sizes=[1] * work.num_records)
        steps.finish()

    yield step


@contextmanager
def _ours(work: Work, *, sizes: list[int]) -> Iterator[Step]:
    with (
        _noise_watched(work, client.dp, "add_secure_normal"),
        private_steps(
            work.model,
            work.optimizer(),
            noise_multiplier=SIGMA,
            max_grad_norm=CLIP,
            batch_size=len(sizes),
        ) as steps,
    ):

        def step() -> None:
            steps.backward(work.losses(work.model).sum(), sizes=sizes)
            steps.finish()

        yield step


def private_records(work: Work) -> AbstractContextManager[Step]:
    """Our step, records as the unit."""
    return _ours(work, sizes=[1] * work.num_records)


def private_patients(work: Work) -> AbstractContextManager[Step]:
    """Our step, patients as the unit: of 4, 3, 2, 1, 4, ... records, the last ones of what is left."""
    sizes: list[int] = []
    while sum(sizes) < work.num_records:
        sizes.append(min(4 - len(sizes) % 4, work.num_records - sum(sizes)))
    return _ours(work, sizes=sizes)


@contextmanager
def _opacus_hooks(work: Work, *, functorch: bool) -> Iterator[Step]:
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    private = GradSampleModule(
        work.model, batch_first=True, loss_reduction="sum", strict=False, force_functorch=functorch
    )
    optimizer = DPOptimizer(
        work.optimizer(),
        noise_multiplier=SIGMA,
        max_grad_norm=CLIP,
        expected_batch_size=work.num_records,
    )

    def step() -> None:
        torch.autograd.backward(work.losses(private).sum())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    try:
        with _noise_watched(work, optimizer, "add_noise"):
            yield step
    finally:
        optimizer.zero_grad(set_to_none=True)
        private.remove_hooks()


def opacus_hooks(work: Work) -> AbstractContextManager[Step]:
    """Opacus's hooks and optimizer, with its own (insecure) noise."""
    return _opacus_hooks(work, functorch=False)


def opacus_functorch(work: Work) -> AbstractContextManager[Step]:
    """The same, each layer's per-record gradient by functorch's vmap over grad."""
    return _opacus_hooks(work, functorch=True)


@contextmanager
def opacus_ghost(work: Work) -> Iterator[Step]:
    """Opacus's ghost clipping: norms in one backward pass, the clipped sum in a second."""
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
        GradSampleModuleFastGradientClipping,
    )
    from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping

    private = GradSampleModuleFastGradientClipping(
        work.model, batch_first=True, loss_reduction="sum", strict=False, max_grad_norm=CLIP
    )
    optimizer = DPOptimizerFastGradientClipping(
        work.optimizer(),
        noise_multiplier=SIGMA,
        max_grad_norm=CLIP,
        expected_batch_size=work.num_records,
    )

    def step() -> None:
        losses = work.losses(private)
        losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        factors = private.get_clipping_coef().detach()
        optimizer.original_optimizer.zero_grad(set_to_none=True)
        private.disable_hooks()
        torch.autograd.backward((factors * losses).sum())
        private.enable_hooks()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    try:
        with _noise_watched(work, optimizer, "add_noise"):
            yield step
    finally:
        optimizer.zero_grad(set_to_none=True)
        private.remove_hooks()
        for parameter in work.parameters:
            vars(parameter).pop("_norm_sample", None)


ARMS: Mapping[str, Callable[[Work], AbstractContextManager[Step]]] = {
    "DP, record": private_records,
    "DP, patient": private_patients,
    "Opacus hooks": opacus_hooks,
    "ghost clipping": opacus_ghost,
    "functorch": opacus_functorch,
}
OURS = ("DP, record", "DP, patient")


@contextmanager
def _noise_watched(work: Work, owner: Any, name: str) -> Iterator[None]:
    """Count the time that a function which makes noise takes."""
    inner = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> None:
        started = work.now()
        inner(*args, **kwargs)
        work.noise_s += work.now() - started

    setattr(owner, name, watched)
    try:
        yield
    finally:
        setattr(owner, name, inner)


def checkpointing(model: Any, *, on: bool) -> AbstractContextManager[None]:
    """Recompute activations in the backward pass, as client.trainer asks for it."""
    return _checkpointing(model) if on else nullcontext()


@contextmanager
def _checkpointing(model: Any) -> Iterator[None]:
    # Its name before transformers 5.23, which may be what a machine with a GPU has.
    old = not hasattr(model, "activation_checkpointing_enable")
    kind = "gradient" if old else "activation"
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": True})
    if not old:
        # It has done the next line by now, and one hook is enough.
        model.disable_input_require_grads()
    model.enable_input_require_grads()
    try:
        yield
    finally:
        model.disable_input_require_grads()
        getattr(model, f"{kind}_checkpointing_disable")()
