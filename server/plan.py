"""What a run will spend, weigh and take, before anything starts: `consilium server plan`.

Everything but the time is exact, if every site takes part in every round: noise and epsilon come from the
same public constants, by the same code, as at the site; bytes are those of the adapters in their wire form.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common.adapter import AdapterShape
from common.audit_log import AuditEntry
from common.config import RunConfig
from common.privacy import (
    GaussianSteps,
    calibrate_noise,
    compose_epsilon,
    public_sample_rate,
)
from server.roster import Roster, RosterEntry
from server.run_time import TimeEstimate


@dataclass(frozen=True, slots=True)
class SitePlan:
    """What a run asks of one site, at most: with federation.fraction below 1 it is not in every round.

    declared_size: in units. sample_rate: q; noise_multiplier: sigma; epsilon: of all steps, at the run's
    delta; sigma 0 and infinite epsilon are no protection. rank: that it would train at, by what it said last;
    rank_known: whether it ever said so. bytes_down, bytes_up: of adapters, over all rounds.
    """

    site: str
    unit: str
    declared_size: int
    sample_rate: float
    noise_multiplier: float
    epsilon: float
    steps: int
    rank: int
    rank_known: bool
    bytes_down: int
    bytes_up: int


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A whole run. sites_per_round: that are asked. bytes_down, bytes_up: of all of them, over all rounds."""

    rounds: int
    sites_per_round: int
    delta: float
    accountant: str
    sites: tuple[SitePlan, ...]
    bytes_down: int
    bytes_up: int
    time: TimeEstimate

    def as_json(self) -> dict[str, Any]:
        """Return it for another program to read."""
        return asdict(self)


def plan_run(
    config: RunConfig,
    *,
    roster: Roster,
    shape: AdapterShape,
    ranks: Mapping[str, int],
    time: TimeEstimate,
) -> PlannedRun:
    """Return what a run will be. shape: of the global adapter. ranks: the highest that each site can hold.

    Raises PrivacyError when no noise meets the run's target.
    """
    sites = tuple(_plan_site(config, one, shape, ranks.get(one.site)) for one in roster.values())
    federation = config.federation
    drawn = max(federation.min_sites, math.ceil(federation.fraction * len(sites)))
    drawn = min(drawn, len(sites))
    # Which of them are drawn is not known: the largest are the most that it can be.
    down = sorted((one.bytes_down for one in sites), reverse=True)[:drawn]
    up = sorted((one.bytes_up for one in sites), reverse=True)[:drawn]
    return PlannedRun(
        rounds=config.train.rounds,
        sites_per_round=drawn,
        delta=config.privacy.target_delta,
        accountant=config.privacy.accountant,
        sites=sites,
        bytes_down=sum(down),
        bytes_up=sum(up),
        time=time,
    )


def told_ranks(entries: Iterable[AuditEntry]) -> dict[str, int]:
    """Return the highest rank that each site last said it can hold. entries: the coordinator's audit log."""
    ranks: dict[str, int] = {}
    for entry in entries:
        fields = entry.fields
        if entry.event == "reply" and fields["kind"] == "describe" and not fields["error"]:
            ranks[fields["site"]] = int(fields["numbers"].get("max-rank", 0))
    return {site: rank for site, rank in ranks.items() if rank > 0}


def _plan_site(
    config: RunConfig, entry: RosterEntry, shape: AdapterShape, most: int | None
) -> SitePlan:
    lora, steps = config.lora, _steps(config, entry)
    rank = lora.rank if most is None else min(most, lora.rank)
    one_way = config.train.rounds * shape.at_rank(rank, lora=lora).safetensors_size()
    return SitePlan(
        site=entry.site,
        unit=config.privacy.unit,
        declared_size=entry.declared_size,
        sample_rate=steps.sample_rate,
        noise_multiplier=steps.noise_multiplier,
        epsilon=compose_epsilon(
            [steps], delta=config.privacy.target_delta, accountant=config.privacy.accountant
        ),
        steps=steps.steps,
        rank=rank,
        rank_known=most is not None,
        bytes_down=one_way,
        bytes_up=one_way,
    )


def _steps(config: RunConfig, entry: RosterEntry) -> GaussianSteps:
    """All steps of a run at one site, as the site itself plans them."""
    privacy = config.privacy
    if not config.use_dp:
        return GaussianSteps(0.0, 1.0, config.total_steps)
    rate = public_sample_rate(batch_size=config.train.batch_size, declared_size=entry.declared_size)
    noise = privacy.noise_multiplier
    if isinstance(noise, str):
        noise = calibrate_noise(
            target_epsilon=privacy.target_epsilon,
            delta=privacy.target_delta,
            sample_rate=rate,
            steps=config.total_steps,
            accountant=privacy.accountant,
        )
    return GaussianSteps(float(noise), rate, config.total_steps)


def plan_sentences(plan: PlannedRun) -> Sequence[str]:
    """Return what holds for the whole run, in words."""
    total = len(plan.sites)
    asked = (
        f"all {total} sites" if plan.sites_per_round == total
        else f"{plan.sites_per_round} of {total} sites, drawn anew"
    )  # fmt: skip
    said = [
        f"Whole run: {plan.rounds} rounds with {asked} in each; {plan.bytes_down:,} bytes down and "
        f"{plan.bytes_up:,} up in adapters, and some kB for the signed message beside each"
    ]
    protected = [one.epsilon for one in plan.sites if math.isfinite(one.epsilon)]
    if len(protected) == total and protected:
        said.append(
            f"Epsilon at most {max(protected):.2f} for each {plan.sites[0].unit} at delta {plan.delta:g} "
            f"({plan.accountant}), over all rounds, for this run alone; what a hospital's data set has spent "
            "before comes on top, in its own ledger"
        )
    else:
        said.append("No differential privacy: what a model keeps of a record is not bounded")
    unknown = [one.site for one in plan.sites if not one.rank_known]
    if unknown:
        said.append(
            f"Not asked yet which rank they can hold: {', '.join(unknown)}; a lower one makes fewer bytes"
        )
    said.append(f"Time: {plan.time.sentence()}")
    return said
