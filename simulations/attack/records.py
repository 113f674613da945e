"""The records of a twin: half of the site's own, made-up canaries by fair coin, and planted people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from common.config import RunConfig
from common.dataset import Records
from common.errors import DataError
from common.model import BaseModel
from common.prompts import Examples, Prompt, resolve_template, tokenize_all
from simulations.attack.guessing import Coins
from simulations.attack.planted import PlantedPerson, plant_people
from simulations.attack.record_canaries import canary_prompts, fair_coins


@dataclass(frozen=True, slots=True)
class TwinRecords:
    """Who was trained on, and who might have been.

    own: all records of the site. members: of each of them, whether it is trained on; alike otherwise, since
    a fair coin decided for each unit (record or patient). canaries, coins: made-up records, and which are
    trained on. people: all are.
    """

    own: tuple[Prompt, ...] = field(repr=False)
    members: Coins
    canaries: tuple[Prompt, ...] = field(repr=False)
    coins: Coins
    people: tuple[PlantedPerson, ...]
    patients: tuple[tuple[int, ...], ...] | None

    @property
    def trained(self) -> list[Prompt]:
        """The training records."""
        own = [prompt for prompt, member in zip(self.own, self.members, strict=True) if member]
        canaries = [prompt for prompt, coin in zip(self.canaries, self.coins, strict=True) if coin]
        return [*own, *canaries, *(person.record for person in self.people)]


def first_units(
    twin: TwinRecords, *, at_most: int
) -> tuple[list[Prompt], tuple[tuple[int, ...], ...] | None]:
    """Return the first units that are trained on, one at least, and the places of each patient's records.

    at_most: records, but for the first unit. The second part is None when records are the units.
    """
    trained = twin.trained
    if twin.patients is None:
        return trained[:at_most], None
    ends = np.cumsum([len(unit) for unit in twin.patients])
    units = twin.patients[: max(1, int(np.searchsorted(ends, at_most, side="right")))]
    kept = sorted(place for unit in units for place in unit)
    now = {place: index for index, place in enumerate(kept)}
    patients = tuple(tuple(now[place] for place in unit) for unit in units)
    return [trained[place] for place in kept], patients


def twin_records(
    records: Records, *, by_patient: bool, canaries: int, people: int, seed: int
) -> TwinRecords:
    """Return a site's records as its twin trains on them, the same for the same seed.

    by_patient: all of a patient's records are trained on, or none; each made-up record is a patient's own.
    Raises DataError when the site has fewer than two units.
    """
    units = records.patients if by_patient else tuple((i,) for i in range(len(records)))
    if len(units) < 2:
        raise DataError(
            f"the site has {len(units)} {'patients' if by_patient else 'records'} to tell members from "
            "non-members by; two are needed, and some thousands show more"
        )
    chosen = fair_coins(len(units), seed=seed, stream="members")
    # However the coins fall, there is a member and a non-member.
    chosen[0], chosen[1] = True, False
    members = np.zeros(len(records), dtype=np.bool_)
    for unit, member in zip(units, chosen, strict=True):
        members[list(unit)] = member
    coins = fair_coins(canaries, seed=seed, stream="canaries in")
    # Where each record stands among those that are trained on.
    place = np.cumsum(members) - 1
    patients = [
        tuple(int(place[i]) for i in unit)
        for unit, member in zip(units, chosen, strict=True)
        if member
    ]
    made_up = int(coins.sum()) + people
    patients += [(int(members.sum()) + extra,) for extra in range(made_up)]
    return TwinRecords(
        own=records.prompts,
        members=members,
        canaries=tuple(canary_prompts(canaries, seed=seed)),
        coins=coins,
        people=tuple(plant_people(people, seed=seed)),
        patients=tuple(patients) if by_patient else None,
    )


def as_examples(prompts: Sequence[Prompt], config: RunConfig, base: BaseModel) -> Examples:
    """Return records as a run's tokens."""
    return tokenize_all(
        prompts,
        tokenizer=base.tokenizer,
        template=resolve_template(config.data.prompt_template),
        max_length=config.data.max_length,
    )
