"""Canaries in gradient space: rows that no record would give, in or out by a fair coin, sought in each step.

The white-box auditor of Nasr et al. (2302.07956) and Steinke et al. (2305.08846, section 6): a canary is a
gradient far above the clipping norm along a direction of its own, and what a step hands to the optimizer is
seen. A canary goes through the very code that a record goes through: an input to a LoRA layer whose gradient
is that direction, its backward pass, clipping, sum, noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from client.noise import Entropy
from client.sampling import poisson_sample
from client.trainer import Step
from simulations.attack.guessing import Coins, Scores

# A canary's gradient over the clipping norm.
AMPLITUDE = 10.0
# Rows of a micro-batch; each has as many floats as the adapter.
_ROWS = 256
# Beyond, rotating a layer's sides costs more than it evens out.
_LARGEST_ROTATION = 2048


@dataclass(frozen=True, slots=True)
class Mechanism:
    """What a site's steps are claimed to be.

    noise_multiplier: None without protection. sample_rate: of each canary at each step, as of a record.
    divisor: of the sum, train.batch-size. steps: of the whole run.
    """

    noise_multiplier: float | None
    max_grad_norm: float
    sample_rate: float
    divisor: int
    steps: int


def step_evidence(seen: Scores, mechanism: Mechanism) -> Scores:
    """Return what one step tells of each canary's coin, as a log likelihood ratio of "in" over "out".

    seen: inner product of the step's noisy sum with the canary's direction over the clipping norm C:
    N(0, sigma^2) when it took no part, N(1, sigma^2) when it did, which is a chance of q when it is in.
    Without noise there is no such ratio, and the product itself serves.
    """
    if mechanism.noise_multiplier is None:
        return seen
    ratio = (seen - 0.5) / mechanism.noise_multiplier**2
    rate = mechanism.sample_rate
    if rate == 1.0:
        return ratio
    evidence: Scores = np.logaddexp(math.log1p(-rate), math.log(rate) + ratio)
    return evidence


def rehearse(
    random: np.random.Generator, *, canaries: int, mechanism: Mechanism
) -> tuple[Scores, Coins]:
    """Return scores and coins as they fall out where each step is what it is claimed to be."""
    coins = random.random(canaries) < 0.5
    scores = np.zeros(canaries)
    noise = mechanism.noise_multiplier or 0.0
    for _ in range(mechanism.steps):
        seen = noise * random.standard_normal(canaries, dtype=np.float32).astype(np.float64)
        seen += coins & (random.random(canaries) < mechanism.sample_rate)
        scores += step_evidence(seen, mechanism)
    return scores, coins


class GradientCanaries:
    """So many canaries for the training of one model; `around` is what `client.trainer.train` takes.

    seed: of directions and coins, which are the auditor's own. entropy: of the steps that a canary joins,
    drawn as a record's are. Raises ValueError, at the first round, when there are more canaries than
    trainable weights: each has a direction orthogonal to every other's.
    """

    def __init__(self, count: int, mechanism: Mechanism, *, seed: int, entropy: Entropy) -> None:
        random = np.random.default_rng((seed, 1))
        self.mechanism = mechanism
        self.coins: Coins = random.random(count) < 0.5
        self.scores: Scores = np.zeros(count)
        self._random = random
        self._layers: list[_Layer] = []
        self._included = np.flatnonzero(self.coins)
        self._samples: Iterator[list[int]] = poisson_sample(
            len(self._included),
            sample_rate=mechanism.sample_rate,
            steps=mechanism.steps,
            entropy=entropy,
        )

    def around(self, step: Step, model: nn.Module, optimizer: Optimizer) -> Step:
        """Return a step that the canaries join, and which is watched where the optimizer takes it over."""
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._layers:
            self._layers = self._spread(list(weights.values()))
        modules = [model.get_submodule(name.removesuffix(".weight")) for name in weights]
        optimizer.register_step_pre_hook(lambda *_: self._watch(list(weights.values())))
        return _CanaryStep(step, self, modules)

    def join(self, step: Step, modules: Sequence[nn.Module]) -> None:
        """Add the canaries that are drawn for this step, in micro-batches."""
        drawn = np.zeros(len(self.coins), dtype=np.bool_)
        drawn[self._included[next(self._samples)]] = True
        for layer, module in zip(self._layers, modules, strict=True):
            places = np.flatnonzero(drawn[layer.canaries])
            for start in range(0, len(places), _ROWS):
                part = places[start : start + _ROWS]
                outputs = module(layer.inputs[part].unsqueeze(1))[:, 0]
                loss = (outputs * layer.outputs[part]).sum()
                amplitude = AMPLITUDE * self.mechanism.max_grad_norm
                step.backward(amplitude * loss, sizes=[1] * len(part))

    def _watch(self, weights: Sequence[nn.Parameter]) -> None:
        seen = np.zeros(len(self.coins))
        scale = self.mechanism.divisor / self.mechanism.max_grad_norm
        for layer, weight in zip(self._layers, weights, strict=True):
            if weight.grad is not None and len(layer.canaries):
                products = ((layer.outputs @ weight.grad) * layer.inputs).sum(dim=1)
                seen[layer.canaries] = scale * products.double().cpu().numpy()
        self.scores += step_evidence(seen, self.mechanism)

    def _spread(self, weights: Sequence[nn.Parameter]) -> list[_Layer]:
        ends = list(accumulate(weight.numel() for weight in weights))
        count = len(self.coins)
        if count > ends[-1]:
            raise ValueError(
                f"{count} canaries need as many trainable weights, and there are {ends[-1]}; ask for fewer"
            )
        places = np.sort(self._random.choice(ends[-1], size=count, replace=False))
        order = self._random.permutation(count)
        layers = []
        for end, weight in zip(ends, weights, strict=True):
            start = end - weight.numel()
            here = np.flatnonzero((places >= start) & (places < end))
            rows, columns = np.divmod(places[here] - start, weight.shape[1])
            outputs = self._rotation(weight.shape[0])[rows]
            inputs = self._rotation(weight.shape[1])[columns]
            layers.append(_Layer(order[here], outputs.to(weight), inputs.to(weight)))
        return layers

    def _rotation(self, size: int) -> Tensor:
        """Orthonormal rows, at random: a real gradient spreads evenly over them, and not over a few."""
        if size > _LARGEST_ROTATION:
            return torch.eye(size)
        square = np.linalg.qr(self._random.standard_normal((size, size)))[0]
        return torch.from_numpy(square.astype(np.float32))


@dataclass(frozen=True, slots=True)
class _Layer:
    """The canaries of one weight: outputs (n, d_out) and inputs (n, d_in), whose outer products they are."""

    canaries: npt.NDArray[np.int64]
    outputs: Tensor
    inputs: Tensor


class _CanaryStep:
    def __init__(
        self, step: Step, canaries: GradientCanaries, modules: Sequence[nn.Module]
    ) -> None:
        self._step = step
        self._canaries = canaries
        self._modules = modules

    def backward(self, loss: Tensor, *, sizes: Sequence[int]) -> None:
        self._step.backward(loss, sizes=sizes)

    def finish(self) -> None:
        self._canaries.join(self._step, self._modules)
        self._step.finish()
