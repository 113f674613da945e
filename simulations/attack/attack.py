"""All attacks on one site's training: a twin of it is trained twice, once with canaries in its gradients."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from client.noise import Entropy
from common.adapter import AdapterState
from common.dataset import Records
from common.lora import carrying
from common.model import BaseModel
from simulations.attack.gradient_audit import audit_gradients
from simulations.attack.guessing import audit_scores, guess_rules
from simulations.attack.membership import MembershipAttack, attack_membership
from simulations.attack.planted import PlantedResult, count_reproduced, sample_answers
from simulations.attack.record_losses import RecordLosses, losses_of_records
from simulations.attack.records import TwinRecords, as_examples, first_units, twin_records
from simulations.attack.result import AttackResult, Kind
from simulations.attack.training import Plan, train_twin

# stage, done, of how many.
Progress = Callable[[str, int, int], None]

# Of the site's own, beside the gradient canaries. Whom a ledger protects against knows all other records and
# can take their gradients off what is seen; leaving most of them out comes to the same, and is quicker.
_OTHER_RECORDS = 200

LOSS_CANARIES = "loss canaries, black box"


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard to try. More canaries bound epsilon better and take longer.

    gradient_canaries: at most; the adapter's weights limit them too. record_canaries: at most as many as
    the site has records, so that its own stay the larger part. samples: of each prompt, one of them greedy.
    """

    gradient_canaries: int = 40_000
    record_canaries: int = 2000
    people: int = 50
    prompts: int = 200
    samples: int = 4
    confidence: float = 0.95


@dataclass(frozen=True, slots=True)
class Target:
    """Whom an attack is on: a site of a run, as its twin will train. run: uid or name."""

    kind: Kind
    run: str
    site: str
    plan: Plan
    records: Records


def attack(
    target: Target,
    base: BaseModel,
    *,
    effort: Effort,
    seed: int,
    entropy: Entropy = os.urandom,
    on_progress: Progress = lambda stage, done, total: None,
) -> AttackResult:
    """Return what the attacks on a twin of the site found.

    seed: of all that the auditor draws: coins, canaries, who is a member. entropy: of the training's noise
    and sampling; a test may pass another.
    Raises DataError when there is too little to attack.
    """
    plan, config = target.plan, target.plan.config
    twin = twin_records(
        target.records,
        by_patient=config.privacy.unit == "patient",
        canaries=min(effort.record_canaries, len(target.records)),
        people=min(effort.people, len(target.records)),
        seed=seed,
    )
    ledger = plan.ledger()
    steps = plan.mechanism.steps
    others, patients = first_units(twin, at_most=_OTHER_RECORDS)
    white_box = audit_gradients(
        plan,
        base,
        as_examples(others, config, base),
        patients,
        site=target.site,
        ledger=ledger,
        at_most=effort.gradient_canaries,
        confidence=effort.confidence,
        seed=seed,
        entropy=entropy,
        on_step=lambda step: on_progress("gradient canaries", step, steps),
    )
    adapter = train_twin(
        plan,
        base,
        as_examples(twin.trained, config, base),
        twin.patients,
        site=target.site,
        entropy=entropy,
        on_step=lambda step: on_progress("training the twin", step, steps),
    )
    canaries, own = losses_beside_base(plan, base, adapter, twin, on_progress=on_progress)
    black_box = audit_scores(
        LOSS_CANARIES,
        canaries.base.mean - canaries.final.mean,
        twin.coins,
        rules=guess_rules(len(twin.coins)),
        delta=ledger.delta,
        ledger_epsilon=ledger.epsilon,
        confidence=effort.confidence,
    )
    return AttackResult(
        kind=target.kind,
        run=target.run,
        site=target.site,
        ledger=ledger,
        audits=(white_box, black_box),
        membership=membership_attacks(own, twin, confidence=effort.confidence),
        planted=planted_attack(
            plan, base, adapter, twin, effort, seed=seed, on_progress=on_progress
        ),
        seed=seed,
    )


@dataclass(frozen=True, slots=True)
class BesideBase:
    """Losses of the same records under the untouched base and under the twin."""

    base: RecordLosses
    final: RecordLosses


def losses_beside_base(
    plan: Plan,
    base: BaseModel,
    adapter: AdapterState,
    twin: TwinRecords,
    *,
    on_progress: Progress,
) -> tuple[BesideBase, BesideBase]:
    """Return the losses of the canaries and of the site's own records, trained on or not."""
    config = plan.config
    groups = [as_examples(prompts, config, base) for prompts in (twin.canaries, twin.own)]
    total, done = 2 * sum(map(len, groups)), 0

    def on_records(count: int) -> None:
        nonlocal done
        done += count
        on_progress("losses of records", done, total)

    size = config.evaluation.batch_size
    before = [
        losses_of_records(base.model, base, group, batch_size=size, on_records=on_records)
        for group in groups
    ]
    with carrying(base, config.lora, adapter) as model:
        after = [
            losses_of_records(model, base, group, batch_size=size, on_records=on_records)
            for group in groups
        ]
    canaries, own = (BesideBase(*pair) for pair in zip(before, after, strict=True))
    return canaries, own


def membership_attacks(
    losses: BesideBase, twin: TwinRecords, *, confidence: float
) -> tuple[MembershipAttack, ...]:
    """Return the attacks by loss and by min-k%, each as it stands and less the base's own loss."""
    scores = {
        "loss threshold": -losses.final.mean,
        "loss less base": losses.base.mean - losses.final.mean,
        "min-k%": -losses.final.least_likely,
        "min-k% less base": losses.base.least_likely - losses.final.least_likely,
    }
    return tuple(
        attack_membership(name, found[twin.members], found[~twin.members], confidence=confidence)
        for name, found in scores.items()
    )


def planted_attack(
    plan: Plan,
    base: BaseModel,
    adapter: AdapterState,
    twin: TwinRecords,
    effort: Effort,
    *,
    seed: int,
    on_progress: Progress,
) -> PlantedResult | None:
    """Ask both models for the planted people, and other questions of the training; None without any."""
    if not twin.people:
        return None
    prompts = [*(person.record for person in twin.people), *twin.trained][: effort.prompts]
    asked = as_examples(prompts, plan.config, base)
    done = 0

    def on_prompts(count: int) -> None:
        nonlocal done
        done += count
        on_progress("sampling for planted identifiers", done, 2 * len(asked))

    def reproduced(model: nn.Module) -> int:
        texts = sample_answers(
            model,
            base,
            asked,
            samples=effort.samples,
            seed=seed,
            on_prompts=on_prompts,
        )
        return count_reproduced(twin.people, texts)

    by_base = reproduced(base.model)
    with carrying(base, plan.config.lora, adapter) as model:
        found = reproduced(model)
    return PlantedResult(
        prompts=len(asked),
        planted=len(twin.people),
        reproduced=found,
        reproduced_by_base=by_base,
        samples_per_prompt=effort.samples,
    )
