"""Simulated hospitals: patients, notes and question-answer records, made from a seed.

A record asks one question about a short note. The answer follows from the note's findings and the
facts of its department, so a model that never saw a department cannot answer for it.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType

import numpy as np

from simulations.clinical_vocabulary import (
    DEPARTMENTS,
    FIRST_NAMES,
    SITE_NAMES,
    SURNAMES,
    Condition,
    Department,
    sentence_case,
)

_FIRST_DAY = date(2021, 1, 4)
_DAYS_COVERED = 1400
_FIRST_MRN = 100_000
_NUM_MRNS = 900_000
_DURATIONS = ("two days", "a week", "three weeks", "a month")
_SECOND_CONDITION_RATE = 0.2
_NAME = re.compile(rf"\b(?:{'|'.join(FIRST_NAMES)}) (?:[A-Z]{{1,2}}\. )?(?:{'|'.join(SURNAMES)})\b")
_MRN = re.compile(r"\bMRN (\d{6})\b")

INSTRUCTIONS: tuple[str, ...] = (
    "Which diagnosis fits?",
    "Which treatment is started?",
    "Which test comes next?",
    "What is the follow-up?",
    "Summarise the plan.",
    "Write to the patient.",
)


@dataclass(frozen=True, slots=True)
class SyntheticSpec:
    """Say how many hospitals to make, how large and how different.

    records_per_patient: fewest and most records of one patient, both included.
    Raises ValueError, naming every bad value, if the spec cannot be met.
    """

    num_sites: int = 4  # more sites is closer to a real federation, and costs time in each round
    patients_per_site: int = 400  # under 500 the patient unit warns; fewer is faster to make
    records_per_patient: tuple[int, int] = (2, 5)  # more widens patient from record privacy
    test_records: int = 320  # 40 for each department; more steadies the loss, costs evaluation
    department_skew: float = 0.9  # 0: sites alike, federation gains little; 1: strangers
    seed: int = 0  # the same spec is the same hospitals, byte for byte

    def __post_init__(self) -> None:
        fewest, most = self.records_per_patient
        wrong = []
        if not 1 <= self.num_sites <= len(SITE_NAMES):
            wrong.append(f"num_sites is {self.num_sites}; choose 1 to {len(SITE_NAMES)}")
        if self.patients_per_site < 1:
            wrong.append(f"patients_per_site is {self.patients_per_site}; choose 1 or more")
        if not 1 <= fewest <= most:
            wrong.append(
                f"records_per_patient is ({fewest}, {most}); choose a smallest of 1 or more and a "
                "largest not below it"
            )
        if self.test_records < 0:
            wrong.append(f"test_records is {self.test_records}; choose 0 or more")
        if not 0.0 <= self.department_skew <= 1.0:
            wrong.append(f"department_skew is {self.department_skew}; choose 0.0 to 1.0")
        if self.seed < 0:
            wrong.append(f"seed is {self.seed}; choose 0 or more")
        patients = self.num_sites * self.patients_per_site + self.test_records
        if not wrong and patients > _NUM_MRNS:
            wrong.append(
                f"the spec may need {patients} record numbers and there are {_NUM_MRNS}; lower "
                "patients_per_site or num_sites"
            )
        if wrong:
            raise ValueError("; ".join(wrong))


@dataclass(frozen=True, slots=True)
class SyntheticRecord:
    """Hold one question about one visit, as a line of a hospital's data file.

    patient: the pseudonym that groups a patient's records; the name stands in the text only.
    date: ISO 8601.
    """

    record_id: str
    patient: str
    department: str
    date: str
    instruction: str
    input: str
    output: str

    def to_json(self) -> str:
        """Return the record as one line of JSON, keys in field order, without a line end."""
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class SyntheticHospitals:
    """Hold each site's records by site name, and a test set that no site holds.

    central_test: as many records of each department as of any other (give or take one), by turns, so that
    its first records are a test set too; about patients who exist at no site.
    """

    sites: Mapping[str, tuple[SyntheticRecord, ...]]
    central_test: tuple[SyntheticRecord, ...]


@dataclass(frozen=True, slots=True)
class Person:
    """Hold the identity planted in a patient's notes."""

    name: str
    mrn: str


def generate_hospitals(spec: SyntheticSpec) -> SyntheticHospitals:
    """Return the hospitals of a spec: same spec, same records.

    Each site's patients come from all departments alike (skew 0) to its home departments alone
    (skew 1). Names and record numbers are unique across sites and test set.
    """
    rng = np.random.default_rng(spec.seed)
    people = _people(rng, count=spec.num_sites * spec.patients_per_site + spec.test_records)
    sites: dict[str, tuple[SyntheticRecord, ...]] = {}
    for index, site in enumerate(SITE_NAMES[: spec.num_sites]):
        weights = department_weights(
            index, num_sites=spec.num_sites, department_skew=spec.department_skew
        )
        choices = rng.choice(len(DEPARTMENTS), size=spec.patients_per_site, p=weights)
        records: list[SyntheticRecord] = []
        for number, choice in enumerate(choices):
            records += _patient_records(
                rng,
                person=next(people),
                patient=f"{site}-p{number:05d}",
                first_record=len(records),
                site=site,
                department=DEPARTMENTS[choice],
                num_records=_draw_num_records(rng, spec),
            )
        sites[site] = tuple(records)
    return SyntheticHospitals(
        sites=MappingProxyType(sites), central_test=_central_test(rng, spec, people)
    )


def department_weights(site: int, *, num_sites: int, department_skew: float) -> np.ndarray:
    """Return the share of each department among a site's patients, shape (departments,).

    site: 0-based. Home departments are dealt out in turn; with more sites than departments,
    sites share them.
    """
    count = len(DEPARTMENTS)
    home = np.array(
        [d % num_sites == site if num_sites <= count else d == site % count for d in range(count)],
        dtype=np.float64,
    )
    weights: np.ndarray = (1.0 - department_skew) / count + department_skew * home / home.sum()
    return weights


def planted_identifiers(record: SyntheticRecord) -> tuple[str, ...]:
    """Return the identifying strings in a record's input or output: name, record number, date.

    They are found by the vocabulary's names and the notes' forms, so a record that was read back
    from a file serves as well.
    """
    text = f"{record.input}\n{record.output}"
    found = [match.group(0) for match in _NAME.finditer(text)]
    found += [match.group(1) for match in _MRN.finditer(text)]
    if record.date in text:
        found.append(record.date)
    return tuple(dict.fromkeys(found))


def write_jsonl(records: Iterable[SyntheticRecord], path: Path) -> None:
    """Write records to a file, one JSON line each, all or nothing.

    The folder is made if need be; a file that is there is replaced only once the new one is whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{record.to_json()}\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def compose_note(
    rng: np.random.Generator, *, person: Person, condition: Condition, visit: str
) -> str:
    """Return a note of one or two sentences: who, when, and two of the condition's findings.

    visit: the date, ISO 8601.
    """
    first, second = (condition.findings[i] for i in rng.permutation(3)[:2])
    duration = _DURATIONS[rng.integers(len(_DURATIONS))]
    forms = (
        f"{person.name}, MRN {person.mrn}, seen {visit}. {sentence_case(first)} and {second}.",
        f"Seen {visit}: {person.name} with {first}, also {second}. MRN {person.mrn}.",
        f"{person.name} has {first} for {duration}, with {second}. MRN {person.mrn}.",
        f"Visit of {visit}. {person.name} reports {first} and {second}.",
    )
    return forms[rng.integers(len(forms))]


def compose_answer(
    instruction: str, *, person: Person, department: Department, condition: Condition
) -> str:
    """Return the one right answer to an instruction, given the facts.

    Raises ValueError if the instruction is not one of INSTRUCTIONS.
    """
    act, thing, tell, whom = department.routine
    routine = f"{sentence_case(act)} the {thing} and {tell} the {whom}."
    prescription = f"{condition.drug} {condition.dose}"
    answers = dict(
        zip(
            INSTRUCTIONS,
            (
                f"This fits {condition.name}. {routine}",
                f"Start {prescription}. {routine}",
                f"Request {condition.test} first. {routine}",
                f"Return to the {department.clinic} in {condition.interval}. {routine}",
                f"Treat {condition.name} with {prescription}, then the {department.clinic}.",
                f"Dear {person.name}, take {prescription}. Come back with {department.red_flag}.",
            ),
            strict=True,
        )
    )
    if instruction not in answers:
        raise ValueError(
            f"instruction {instruction!r} has no answer; choose one of {', '.join(INSTRUCTIONS)}"
        )
    return answers[instruction]


def _draw_num_records(rng: np.random.Generator, spec: SyntheticSpec) -> int:
    fewest, most = spec.records_per_patient
    return int(rng.integers(fewest, most + 1))


def _people(rng: np.random.Generator, *, count: int) -> Iterator[Person]:
    """Yield people without repeating a name or a record number.

    Once every first and last name has been paired, a middle initial makes further names.
    """
    pairs = len(FIRST_NAMES) * len(SURNAMES)
    order = rng.permutation(pairs)
    mrns = rng.choice(_NUM_MRNS, size=count, replace=False) + _FIRST_MRN
    for index, mrn in enumerate(mrns):
        lap, place = divmod(index, pairs)
        first, last = divmod(int(order[place]), len(SURNAMES))
        yield Person(f"{FIRST_NAMES[first]} {_initial(lap)}{SURNAMES[last]}", f"{mrn:06d}")


def _initial(lap: int) -> str:
    if lap == 0:
        return ""
    tens, units = divmod(lap - 1, 26)
    return f"{chr(64 + tens) if tens else ''}{chr(65 + units)}. "


def _patient_records(
    rng: np.random.Generator,
    *,
    person: Person,
    patient: str,
    first_record: int,
    site: str,
    department: Department,
    num_records: int,
) -> list[SyntheticRecord]:
    """Return one patient's visits in order of time; their conditions recur."""
    main, other = rng.permutation(len(department.conditions))[:2]
    days = np.sort(rng.choice(_DAYS_COVERED, size=num_records, replace=num_records > _DAYS_COVERED))
    records = []
    for number, day in enumerate(days):
        recurring = main if rng.random() >= _SECOND_CONDITION_RATE else other
        condition = department.conditions[recurring]
        instruction = INSTRUCTIONS[rng.integers(len(INSTRUCTIONS))]
        visit = (_FIRST_DAY + timedelta(days=int(day))).isoformat()
        records.append(
            SyntheticRecord(
                record_id=f"{site}-r{first_record + number:06d}",
                patient=patient,
                department=department.name,
                date=visit,
                instruction=instruction,
                input=compose_note(rng, person=person, condition=condition, visit=visit),
                output=compose_answer(
                    instruction, person=person, department=department, condition=condition
                ),
            )
        )
    return records


def _central_test(
    rng: np.random.Generator, spec: SyntheticSpec, people: Iterator[Person]
) -> tuple[SyntheticRecord, ...]:
    by_department: list[list[SyntheticRecord]] = []
    patients = written = 0
    for index, department in enumerate(DEPARTMENTS):
        records: list[SyntheticRecord] = []
        left = (spec.test_records + len(DEPARTMENTS) - 1 - index) // len(DEPARTMENTS)
        while left > 0:
            visits = _patient_records(
                rng,
                person=next(people),
                patient=f"test-p{patients:05d}",
                first_record=written + len(records),
                site="test",
                department=department,
                num_records=min(left, _draw_num_records(rng, spec)),
            )
            records += visits
            left -= len(visits)
            patients += 1
        written += len(records)
        by_department.append(records)
    turns = zip_longest(*by_department)
    return tuple(record for turn in turns for record in turn if record is not None)
