"""The white-box audit of one site's training: canaries in its gradients, and what the steps show of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from client.noise import Entropy
from common.config import RunConfig, TrainedFactors
from common.lora import attached
from common.model import BaseModel
from common.prompts import Examples
from server.aggregation import METHODS
from simulations.attack.gradient_canaries import GradientCanaries, rehearse
from simulations.attack.guessing import Audit, audit_scores, rehearsed_rule
from simulations.attack.training import Ledger, Plan, train_twin

GRADIENT_CANARIES = "gradient canaries, white box"


def audit_gradients(
    plan: Plan,
    base: BaseModel,
    examples: Examples,
    patients: Sequence[Sequence[int]] | None,
    *,
    site: str,
    ledger: Ledger,
    at_most: int,
    confidence: float,
    seed: int,
    entropy: Entropy,
    on_step: Callable[[int], None] = lambda step: None,
) -> Audit:
    """Train a twin with canaries in its gradients, and return what its noisy sums give away of them.

    Each canary joins each step with the chance q that a record has, so that the ledger's epsilon is its own.
    patients, site, entropy, on_step: as `train_twin` takes them. at_most: canaries; the weights that any
    round trains limit them too.
    """
    config, mechanism = plan.config, plan.mechanism
    method = METHODS[config.aggregation.method]
    factors = {method.trained(number) for number in range(1, plan.rounds + 1)}
    count = min(at_most, *(_width(base, config, one) for one in factors))
    # Before there is a score to look at.
    rehearsed = rehearsed_rule(
        lambda random: rehearse(random, canaries=count, mechanism=mechanism),
        delta=ledger.delta,
        confidence=confidence,
        seed=seed,
    )
    watched = GradientCanaries(count, mechanism, seed=seed, entropy=entropy)
    train_twin(
        plan,
        base,
        examples,
        patients,
        site=site,
        entropy=entropy,
        around=watched.around,
        on_step=on_step,
    )
    found = audit_scores(
        GRADIENT_CANARIES,
        watched.scores,
        watched.coins,
        rules=[rehearsed.rule],
        delta=ledger.delta,
        ledger_epsilon=ledger.epsilon,
        confidence=confidence,
    )
    return replace(found, epsilon_rehearsed=rehearsed.epsilon_lower)


def _width(base: BaseModel, config: RunConfig, factors: TrainedFactors) -> int:
    with attached(base, config.lora, trained_factors=factors) as model:
        return sum(p.numel() for p in model.parameters() if p.requires_grad)
