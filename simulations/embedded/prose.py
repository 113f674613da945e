"""General clinical prose for pre-training: the hospitals' words, without their facts.

Notes are written as hospitals write them, and the conditions and findings after a note keep to its
subject, so the base model learns to read a note. Drugs, doses, tests, clinics and staff are drawn
at random, so it learns to spell them and not which belongs to what.
"""

from __future__ import annotations

from datetime import date, timedelta
from typing import TypeVar

import numpy as np

from simulations.clinical_vocabulary import (
    DEPARTMENTS,
    FIRST_NAMES,
    SURNAMES,
    Condition,
    Department,
    sentence_case,
)
from simulations.synthetic import Person, compose_note

T = TypeVar("T")

_FIRST_DAY = date(2015, 1, 1)
_DAYS_COVERED = 3600
_ON_SUBJECT = 0.8
_HEADINGS = (
    "Note",
    "Letter",
    "Ward round",
    "Instruction sheet",
    "Input from the team",
    "Response to treatment",
)
_PLAIN = (
    "The ward asked which diagnosis fits and what the plan is.",
    "Which question comes next is for the morning round.",
    "The family would like to know what the follow-up is.",
    "A student will summarise the visit and write to the practice.",
    "The treatment is started once the result is here.",
    "This plan fits the request of the patient.",
    "Start early, return late, come back tomorrow.",
    "They treat first and request a result then.",
    "Slept well and ate a little.",
    "No change since the last visit.",
)


def write_documents(*, seed: int, count: int) -> list[str]:
    """Return documents of a few sentences each: same seed, same documents."""
    rng = np.random.default_rng(seed)
    return [_document(rng) for _ in range(count)]


def _document(rng: np.random.Generator) -> str:
    person = _person(rng)
    visit = (_FIRST_DAY + timedelta(days=int(rng.integers(_DAYS_COVERED)))).isoformat()
    house = _department(rng)
    subject = _pick(rng, house.conditions)
    parts = [compose_note(rng, person=person, condition=subject, visit=visit)]
    for _ in range(rng.integers(1, 5)):
        parts.append(_sentence(rng, person=person, visit=visit, house=house, subject=subject))
    if rng.random() < 0.2:
        parts.append(parts.pop(0))
    if rng.random() < 0.5:
        cut = int(rng.integers(1, len(parts) + 1))
        blocks = [" ".join(part) for part in (parts[:cut], parts[cut:]) if part]
        return "\n\n".join(f"### {_pick(rng, _HEADINGS)}:\n{block}" for block in blocks)
    return " ".join(parts)


def _sentence(
    rng: np.random.Generator, *, person: Person, visit: str, house: Department, subject: Condition
) -> str:
    """Return one sentence: conditions and findings near the subject, other slots apart."""
    near, kin = (
        _pick(rng, house.conditions) if rng.random() < _ON_SUBJECT else _condition(rng)
        for _ in range(2)
    )
    shown = subject if rng.random() < _ON_SUBJECT else _condition(rng)
    first, second = _condition(rng), _condition(rng)
    medicine = f"{_condition(rng).drug} {_condition(rng).dose}"
    place, other = _department(rng), _department(rng)
    action, thing = _department(rng).routine[0], _department(rng).routine[1]
    telling, staff = _department(rng).routine[2], _department(rng).routine[3]
    forms = (
        f"{sentence_case(medicine)} was continued overnight.",
        f"We gave {medicine} without trouble.",
        f"{person.name} asked to stop {medicine}.",
        f"The last {first.drug} was changed to {medicine}.",
        f"We saw {first.test} and then {second.test}.",
        f"The result of {first.test} is awaited for {person.name}.",
        f"{sentence_case(near.name)} was ruled out last year.",
        f"The leaflet on {near.name} and {kin.name} was given out.",
        f"A sister had {near.name}.",
        f"The {place.clinic} moved the visit by {first.interval}.",
        f"After {first.interval} the {place.clinic} wrote to the {staff}.",
        f"The {staff} had to {action} the {thing}.",
        f"Please {telling} the {staff} about the {thing}.",
        f"{sentence_case(action)} this, {telling} them and call the {staff}.",
        f"There was no {place.red_flag} and no {other.red_flag}.",
        f"Dear {person.name}, thank you for coming on {visit}.",
        f"Dear {person.name}, the {thing} is ready at the {place.clinic}.",
        f"{person.name} was seen with {_pick(rng, shown.findings)}.",
        f"There was also {_pick(rng, shown.findings)}.",
        f"In the notes: {_pick(rng, shown.findings)}, perhaps {near.name}.",
        f"Before that came {_pick(rng, shown.findings)}.",
        _pick(rng, _PLAIN),
    )
    return _pick(rng, forms)


def _person(rng: np.random.Generator) -> Person:
    name = f"{_pick(rng, FIRST_NAMES)} {_pick(rng, SURNAMES)}"
    return Person(name, f"{rng.integers(100_000, 1_000_000)}")


def _department(rng: np.random.Generator) -> Department:
    return _pick(rng, DEPARTMENTS)


def _condition(rng: np.random.Generator) -> Condition:
    return _pick(rng, _department(rng).conditions)


def _pick(rng: np.random.Generator, choices: tuple[T, ...]) -> T:
    return choices[rng.integers(len(choices))]
