"""Canaries in gradient space: rows that no record would give, in or out by a fair coin, sought in each step.

The white-box auditor of Nasr et al. (2302.07956) and Steinke et al. (2305.08846, section 6): a canary is a
gradient far above the clipping norm along a direction of its own, and what a step hands to the optimizer is
seen. A canary goes through the very code that a record goes through: an input to a LoRA layer whose gradient
is that direction, its backward pass, clipping, sum, noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from client.noise import Entropy
from client.sampling import poisson_sample
from client.trainer import Step
from common.seeding import derive_seed
from simulations.attack.guessing import Coins, Scores

# A canary's gradient over the clipping norm.
AMPLITUDE = 10.0
# Floats of a micro-batch's rows, each of which is as wide as the adapter; and rows at most.
_FLOATS, _ROWS = 2**24, 256
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
    drawn as a record's are. Raises ValueError, at the first round that does so, when there are more canaries
    than weights that it trains: each has a direction orthogonal to every other's.
    """

    def __init__(self, count: int, mechanism: Mechanism, *, seed: int, entropy: Entropy) -> None:
        random = np.random.default_rng(derive_seed(seed, "attack", "gradient canaries"))
        self.mechanism = mechanism
        self.coins: Coins = random.random(count) < 0.5
        self.scores: Scores = np.zeros(count)
        self._random = random
        # By the weights that a round trains: where factors take turns, each has directions of its own.
        self._layers: dict[tuple[str, ...], dict[str, _Layer]] = {}
        self._rows = _ROWS
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
        trained = tuple(weights)
        if trained not in self._layers:
            self._layers[trained] = self._spread(weights)
        layers = self._layers[trained]
        modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in layers}
        optimizer.register_step_pre_hook(lambda *_: self._watch(weights, layers))
        return _CanaryStep(step, lambda: self._join(step, modules, layers))

    def _join(
        self, step: Step, modules: Mapping[str, nn.Module], layers: Mapping[str, _Layer]
    ) -> None:
        """Add the canaries that are drawn for this step, in micro-batches."""
        drawn = np.zeros(len(self.coins), dtype=np.bool_)
        drawn[self._included[next(self._samples)]] = True
        for name, module in modules.items():
            layer = layers[name]
            places = np.flatnonzero(drawn[layer.canaries])
            for start in range(0, len(places), self._rows):
                part = places[start : start + self._rows]
                outputs = module(layer.inputs[part].unsqueeze(1))[:, 0]
                loss = (outputs * layer.outputs[part]).sum()
                amplitude = AMPLITUDE * self.mechanism.max_grad_norm
                step.backward(amplitude * loss, sizes=[1] * len(part))

    def _watch(self, weights: Mapping[str, nn.Parameter], layers: Mapping[str, _Layer]) -> None:
        seen = np.zeros(len(self.coins))
        scale = self.mechanism.divisor / self.mechanism.max_grad_norm
        for name, layer in layers.items():
            gradient = weights[name].grad
            if gradient is not None:
                products = ((layer.outputs @ gradient) * layer.inputs).sum(dim=1)
                seen[layer.canaries] = scale * products.double().cpu().numpy()
        self.scores += step_evidence(seen, self.mechanism)

    def _spread(self, weights: Mapping[str, nn.Parameter]) -> dict[str, _Layer]:
        width, count = sum(weight.numel() for weight in weights.values()), len(self.coins)
        if count > width:
            raise ValueError(
                f"{count} canaries need as many trainable weights, and there are {width}; ask for fewer"
            )
        self._rows = max(1, min(self._rows, _FLOATS // width))
        places = np.sort(self._random.choice(width, size=count, replace=False))
        order = self._random.permutation(count)
        layers = {}
        start = 0
        for name, weight in weights.items():
            end = start + weight.numel()
            here = np.flatnonzero((places >= start) & (places < end))
            if len(here):
                rows, columns = np.divmod(places[here] - start, weight.shape[1])
                outputs = self._rotation(weight.shape[0])[rows]
                inputs = self._rotation(weight.shape[1])[columns]
                layers[name] = _Layer(order[here], outputs.to(weight), inputs.to(weight))
            start = end
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
    def __init__(self, step: Step, join: Callable[[], None]) -> None:
        self._step = step
        self._join = join

    def backward(self, loss: Tensor, *, sizes: Sequence[int]) -> None:
        self._step.backward(loss, sizes=sizes)

    def finish(self) -> None:
        self._join()
        self._step.finish()
