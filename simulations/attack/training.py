"""A twin: one site's training as a run asks for it, all rounds of it, without the other sites.

The rounds, steps, schedule, sampling, clipping and noise are those that the site would train with, by the
code that it trains with; what a merge would bring in between is left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from client.noise import Entropy
from client.plan import dp_settings
from client.trainer import DpSettings, Step, train
from common.adapter import AdapterState
from common.config import RunConfig
from common.lora import attached, initial_adapter, read_adapter, write_adapter
from common.model import BaseModel
from common.privacy import GaussianSteps, compose_epsilon
from common.prompts import Examples
from server.aggregation import METHODS
from simulations.attack.gradient_canaries import Mechanism


@dataclass(frozen=True, slots=True)
class Ledger:
    """What the training costs by its own account. epsilon: None without protection."""

    unit: str
    epsilon: float | None
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How a site of a declared size trains in a run, from public constants alone.

    rounds: how many of the run's were trained. dp: None without protection.
    """

    config: RunConfig
    rounds: int
    dp: DpSettings | None
    sample_rate: float

    @property
    def mechanism(self) -> Mechanism:
        """The steps as their auditor knows them."""
        return Mechanism(
            noise_multiplier=None if self.dp is None else self.dp.noise_multiplier,
            max_grad_norm=self.config.privacy.max_grad_norm,
            sample_rate=self.sample_rate,
            divisor=self.config.train.batch_size,
            steps=self.rounds * self.config.train.local_steps,
        )

    def ledger(self) -> Ledger:
        """Return what the site's ledger counts for it."""
        privacy, mechanism = self.config.privacy, self.mechanism
        if self.dp is None:
            return Ledger(
                "none", None, privacy.target_delta, 0.0, self.sample_rate, mechanism.steps
            )
        part = GaussianSteps(self.dp.noise_multiplier, self.sample_rate, mechanism.steps)
        epsilon = compose_epsilon([part], delta=privacy.target_delta, accountant=privacy.accountant)
        return Ledger(
            unit=privacy.unit,
            epsilon=epsilon,
            delta=privacy.target_delta,
            noise_multiplier=part.noise_multiplier,
            sample_rate=part.sample_rate,
            steps=part.steps,
        )


def plan_twin(config: RunConfig, *, declared_size: int, rounds: int | None = None) -> Plan:
    """Return how a site trains. rounds: fewer than the run's, where it ended early.

    Raises PrivacyError when no noise reaches the target.
    """
    dp = dp_settings(config, declared_size=declared_size)
    rate = min(1.0, config.train.batch_size / declared_size) if dp is None else dp.sample_rate
    return Plan(config, rounds or config.train.rounds, dp, rate)


def _as_it_is(step: Step, model: nn.Module, optimizer: Optimizer) -> Step:
    return step


def train_twin(
    plan: Plan,
    base: BaseModel,
    examples: Examples,
    patients: Sequence[Sequence[int]] | None,
    *,
    site: str,
    entropy: Entropy = os.urandom,
    around: Callable[[Step, nn.Module, Optimizer], Step] = _as_it_is,
    on_step: Callable[[int], None] = lambda step: None,
) -> AdapterState:
    """Return the adapter after all rounds.

    patients: the places of each patient's records when patients are the unit, else None.
    entropy, around: as `client.trainer.train` takes them. on_step: is told each step of the whole training.
    """
    config = plan.config
    state = initial_adapter(base, config.lora, seed=config.train.seed)
    for server_round in range(1, plan.rounds + 1):
        done = (server_round - 1) * config.train.local_steps
        factors = METHODS[config.aggregation.method].trained(server_round)
        with attached(base, config.lora, trained_factors=factors) as model:
            write_adapter(model, state)
            train(
                model,
                examples,
                settings=config.train,
                server_round=server_round,
                stream=site,
                pad_id=base.pad_id,
                device=base.device,
                dp=plan.dp,
                patients=patients,
                entropy=entropy,
                on_step=lambda step, done=done: on_step(done + step),  # type: ignore[misc]
                around=around,
            )
            state = read_adapter(model, config.lora, rank=config.lora.rank)
    return state
