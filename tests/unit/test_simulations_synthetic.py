"""Simulated hospitals: seeded, skewed, longitudinal, and with known identifiers planted."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from simulations.clinical_vocabulary import DEPARTMENTS, SITE_NAMES
from simulations.synthetic import (
    INSTRUCTIONS,
    Person,
    SyntheticHospitals,
    SyntheticRecord,
    SyntheticSpec,
    compose_answer,
    department_weights,
    generate_hospitals,
    planted_identifiers,
    write_jsonl,
)


@pytest.fixture(scope="module")
def hospitals() -> SyntheticHospitals:
    return generate_hospitals(SyntheticSpec(seed=3))


def _all_records(hospitals: SyntheticHospitals) -> list[SyntheticRecord]:
    return [r for site in hospitals.sites.values() for r in site] + list(hospitals.central_test)


def test_same_spec_gives_the_same_records_and_another_seed_others() -> None:
    small = SyntheticSpec(num_sites=2, patients_per_site=5, test_records=8, seed=1)
    other = SyntheticSpec(num_sites=2, patients_per_site=5, test_records=8, seed=2)
    assert _all_records(generate_hospitals(small)) == _all_records(generate_hospitals(small))
    assert _all_records(generate_hospitals(small)) != _all_records(generate_hospitals(other))


@pytest.mark.parametrize("num_sites", [1, 3, 8, 64])
def test_every_site_has_a_name_and_its_patients(num_sites: int) -> None:
    made = generate_hospitals(SyntheticSpec(num_sites=num_sites, patients_per_site=6))
    assert len(made.sites) == num_sites
    assert len(set(SITE_NAMES)) == len(SITE_NAMES) == 64
    for site, records in made.sites.items():
        assert len({record.patient for record in records}) == 6
        assert all(record.patient.startswith(f"{site}-p") for record in records)


def test_default_site_has_400_patients_and_about_1400_records(
    hospitals: SyntheticHospitals,
) -> None:
    for records in hospitals.sites.values():
        assert len({record.patient for record in records}) == 400
        # The mean of 2, 3, 4, 5 is 3.5; its deviation over 400 patients is about 22 records.
        assert 1300 < len(records) < 1500


def test_patients_have_two_to_five_dated_visits_whose_conditions_recur(
    hospitals: SyntheticHospitals,
) -> None:
    visits: dict[str, list[SyntheticRecord]] = defaultdict(list)
    for record in hospitals.sites["north"]:
        visits[record.patient].append(record)
    assert {len(records) for records in visits.values()} == {2, 3, 4, 5}
    for records in visits.values():
        dates = [record.date for record in records]
        assert dates == sorted(set(dates))
        assert len({record.department for record in records}) == 1
        seen = {_condition_named_in(record) for record in records}
        assert len(seen) <= 2


def _condition_named_in(record: SyntheticRecord) -> str:
    found = [
        condition.name
        for department in DEPARTMENTS
        for condition in department.conditions
        if sum(finding.lower() in record.input.lower() for finding in condition.findings) == 2
    ]
    assert len(found) == 1, "two findings of exactly one condition tell which it is"
    return found[0]


def test_answer_follows_from_instruction_and_note(hospitals: SyntheticHospitals) -> None:
    by_question: dict[tuple[str, str], set[str]] = defaultdict(set)
    for record in _all_records(hospitals):
        names = planted_identifiers(record)
        answer = record.output.replace(names[0], "NAME")
        by_question[record.instruction, _condition_named_in(record)].add(answer)
    assert len(by_question) == len(INSTRUCTIONS) * 40
    assert all(len(answers) == 1 for answers in by_question.values())


def test_departments_answer_differently() -> None:
    person = Person("Ada Ashbury", "123456")
    for instruction in INSTRUCTIONS:
        answers = {
            compose_answer(instruction, person=person, department=d, condition=c)
            for d in DEPARTMENTS
            for c in d.conditions
        }
        assert len(answers) == 40
    with pytest.raises(ValueError, match=r"'Why\?' has no answer; choose one of Which diagnosis"):
        compose_answer(
            "Why?",
            person=person,
            department=DEPARTMENTS[0],
            condition=DEPARTMENTS[0].conditions[0],
        )


def test_central_test_is_balanced_and_shares_no_patient_with_a_site(
    hospitals: SyntheticHospitals,
) -> None:
    counts = Counter(record.department for record in hospitals.central_test)
    assert counts == {department.name: 40 for department in DEPARTMENTS}
    first = [record.department for record in hospitals.central_test[: len(DEPARTMENTS)]]
    assert first == [department.name for department in DEPARTMENTS]
    at_sites: set[str] = set()
    for records in hospitals.sites.values():
        for record in records:
            at_sites |= {record.record_id, record.patient, *_name_and_number(record)}
    in_test: set[str] = set()
    for record in hospitals.central_test:
        in_test |= {record.record_id, record.patient, *_name_and_number(record)}
    assert not at_sites & in_test


def _name_and_number(record: SyntheticRecord) -> set[str]:
    return {text for text in planted_identifiers(record) if text != record.date}


def test_names_stay_unique_beyond_the_table_of_names() -> None:
    made = generate_hospitals(
        SyntheticSpec(num_sites=40, patients_per_site=400, records_per_patient=(1, 1))
    )
    names = [planted_identifiers(r)[0] for records in made.sites.values() for r in records]
    assert len(set(names)) == len(names) == 16_000


def test_skew_goes_from_alike_to_strangers() -> None:
    alike = department_weights(0, num_sites=4, department_skew=0.0)
    assert alike == pytest.approx([1 / 8] * 8)
    strangers = department_weights(1, num_sites=4, department_skew=1.0)
    assert strangers == pytest.approx([0, 0.5, 0, 0, 0, 0.5, 0, 0])
    # Half of 1/8, and half of a whole share for the one home department of site 9 of 10.
    shared = department_weights(9, num_sites=10, department_skew=0.5)
    assert shared == pytest.approx([1 / 16, 9 / 16] + [1 / 16] * 6)
    for num_sites in (1, 3, 8, 64):
        for site in range(num_sites):
            weights = department_weights(site, num_sites=num_sites, department_skew=0.9)
            assert weights.sum() == pytest.approx(1.0)


def test_generated_sites_follow_the_skew() -> None:
    made = generate_hospitals(SyntheticSpec(department_skew=1.0, patients_per_site=50))
    homes = [{record.department for record in records} for records in made.sites.values()]
    assert sorted(name for home in homes for name in home) == sorted(d.name for d in DEPARTMENTS)


def test_planted_identifiers_are_in_the_text_and_complete(hospitals: SyntheticHospitals) -> None:
    numbers_seen = dates_seen = names_in_output = 0
    for record in _all_records(hospitals):
        name, *others = planted_identifiers(record)
        assert all(text in f"{record.input} {record.output}" for text in (name, *others))
        assert name in record.input
        digits = [word.strip(".,:") for word in record.input.split() if word[0].isdigit()]
        assert set(others) == {word for word in digits if len(word) in (6, 10)}
        numbers_seen += any(len(text) == 6 for text in others)
        dates_seen += record.date in others
        names_in_output += name in record.output
    total = len(_all_records(hospitals))
    # Three of four note forms give the number and three the date; one of six answers the name.
    assert numbers_seen / total == pytest.approx(3 / 4, abs=0.03)
    assert dates_seen / total == pytest.approx(3 / 4, abs=0.03)
    assert names_in_output / total == pytest.approx(1 / 6, abs=0.03)


def test_record_is_one_json_line_and_cannot_be_changed(hospitals: SyntheticHospitals) -> None:
    record = hospitals.central_test[0]
    line = record.to_json()
    assert "\n" not in line
    assert list(json.loads(line)) == [
        "record_id",
        "patient",
        "department",
        "date",
        "instruction",
        "input",
        "output",
    ]
    assert SyntheticRecord(**json.loads(line)) == record
    with pytest.raises(AttributeError, match="output"):
        record.output = ""  # type: ignore[misc]
    with pytest.raises(TypeError, match="item assignment"):
        hospitals.sites["north"] = ()  # type: ignore[index]


def test_write_jsonl_writes_every_record_and_replaces_all_or_nothing(
    hospitals: SyntheticHospitals, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "records.jsonl"
    records = hospitals.central_test[:5]
    write_jsonl(records, path)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert tuple(SyntheticRecord(**json.loads(line)) for line in lines) == records
    before = path.read_bytes()

    def breaks_off() -> object:
        yield records[1]
        raise RuntimeError("the generator broke off")

    with pytest.raises(RuntimeError, match="broke off"):
        write_jsonl(breaks_off(), path)  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["records.jsonl"]


def test_records_are_short(hospitals: SyntheticHospitals) -> None:
    lengths = [len(f"{r.instruction} {r.input} {r.output}".split()) for r in hospitals.central_test]
    assert np.mean(lengths) < 45
    assert max(lengths) < 60


def test_spec_reports_every_bad_value_at_once() -> None:
    with pytest.raises(ValueError, match=r"num_sites is 65; choose 1 to 64; .*skew is 1\.5"):
        SyntheticSpec(num_sites=65, department_skew=1.5)
    with pytest.raises(ValueError, match=r"records_per_patient is \(3, 2\)"):
        SyntheticSpec(records_per_patient=(3, 2))
    with pytest.raises(ValueError, match=r"patients_per_site is 0.*test_records is -1.*seed is -2"):
        SyntheticSpec(patients_per_site=0, test_records=-1, seed=-2)
    with pytest.raises(ValueError, match="there are 900000"):
        SyntheticSpec(patients_per_site=900_000)
