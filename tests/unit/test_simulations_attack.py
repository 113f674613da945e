"""A whole attack on tiny sites: who is trained on, what is planted, what attack.json says and does not."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import RunConfig, load_run_config
from common.dataset import Records
from common.errors import DataError
from common.lora import carrying
from common.model import BaseModel, choose_device, load_base
from common.prompts import Examples, Prompt
from server.attack_report import write_attack
from simulations.attack.attack import Effort, Target, attack
from simulations.attack.guessing import audit_scores, guess_rules
from simulations.attack.planted import count_reproduced, plant_people, sample_answers
from simulations.attack.record_canaries import canary_prompts, fair_coins
from simulations.attack.record_losses import losses_of_records
from simulations.attack.records import as_examples, first_units, twin_records
from simulations.attack.result import AttackResult
from simulations.attack.training import plan_twin, train_twin
from simulations.embedded import embedded_model_dir
from simulations.run import resolve_base
from simulations.sites import find_sites, site_records
from tests.unit.scenarios import write_scenario

SMALL = Effort(gradient_canaries=500, record_canaries=40, people=3, prompts=6, samples=2)


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    return write_scenario(tmp_path_factory.mktemp("attack") / "scenario", tiny_model_dir)


def _attack(scenario: Path, **changes: Any) -> AttackResult:
    dotted = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    config = load_run_config(scenario / "run.toml").replace(dotted)
    config, model = resolve_base(config, base_dir=scenario)
    base = load_base(model.path, config.model, device=choose_device(), expected_digest="")
    source = find_sites(scenario / "sites")[0]
    records = site_records(source, config=config)
    units = len(records.patients) or len(records)
    plan = plan_twin(config, declared_size=units)
    target = Target("simulation", "tiny", source.name, plan, records)
    return attack(target, base, effort=SMALL, seed=1, entropy=random.Random(1).randbytes)


@pytest.fixture(scope="module")
def plain(scenario: Path) -> dict[str, Any]:
    return _attack(scenario).as_json()


@pytest.fixture(scope="module")
def private(scenario: Path) -> dict[str, Any]:
    return _attack(scenario, privacy__unit="record", privacy__target_epsilon=4.0).as_json()


def test_without_protection_gradients_give_away_who_was_in(plain: dict[str, Any]) -> None:
    white_box, black_box = plain["audits"]
    assert white_box["name"] == "gradient canaries, white box"
    assert black_box["name"] == "loss canaries, black box"
    assert white_box["epsilon_lower"] > 1
    assert plain["ledger"]["epsilon"] is None
    assert white_box["ledger_epsilon_at_delta"] is None


def test_with_protection_every_bound_stays_at_or_below_the_ledger(private: dict[str, Any]) -> None:
    assert private["ledger"]["unit"] == "record"
    assert private["ledger"]["epsilon"] == pytest.approx(4.0, abs=0.02)
    assert private["ledger"]["steps"] == 4
    for audit in private["audits"]:
        assert audit["ledger_epsilon_at_delta"] == private["ledger"]["epsilon"]
        assert audit["epsilon_lower"] <= private["ledger"]["epsilon"]


def test_a_patient_is_a_unit_too(scenario: Path) -> None:
    found = _attack(scenario, privacy__unit="patient", privacy__noise_multiplier=1.0).as_json()
    assert found["ledger"]["unit"] == "patient"
    assert found["audits"][0]["epsilon_lower"] <= found["ledger"]["epsilon"]


def test_factors_trained_by_turns_are_audited_too(scenario: Path) -> None:
    found = _attack(scenario, aggregation__method="rolora", train__rounds=3).as_json()
    assert found["audits"][0]["epsilon_lower"] > 0.5


def test_the_file_holds_numbers_alone(private: dict[str, Any], tmp_path: Path) -> None:
    path = write_attack(tmp_path / "out", private)
    content = json.loads(path.read_text())
    assert content == private
    assert list(content) == [
        "kind", "run", "site", "ledger", "audits", "membership", "planted", "seed", "scope",
    ]  # fmt: skip
    assert {row["name"] for row in content["membership"]} >= {"loss threshold", "min-k%"}
    for row in content["membership"]:
        assert row["members"] + row["nonmembers"] == 12
        value, low, high = row["auc"]
        assert low <= value <= high
        assert len(row["roc"]) <= 200
    assert content["planted"]["planted"] == 3
    assert content["planted"]["samples_per_prompt"] == 2
    assert "not of this release's data" in content["scope"]


def _records(count: int, *, patients: tuple[tuple[int, ...], ...] = ()) -> Records:
    prompts = tuple(Prompt(f"question {i}", "", f"answer {i}") for i in range(count))
    return Records(prompts, 0, patients)


def test_members_canaries_and_people_are_trained_on_and_no_others() -> None:
    twin = twin_records(_records(100), by_patient=False, canaries=20, people=2, seed=0)
    trained = [prompt.output for prompt in twin.trained]
    for i, member in enumerate(twin.members):
        assert (f"answer {i}" in trained) == member
    for canary, coin in zip(twin.canaries, twin.coins, strict=True):
        assert (canary.output in trained) == coin
    assert all(person.record.output in trained for person in twin.people)
    assert 30 < twin.members.sum() < 70
    assert twin.patients is None


def test_a_patients_records_are_members_together_and_found_again() -> None:
    patients = tuple((i, i + 10) for i in range(10))
    twin = twin_records(
        _records(20, patients=patients), by_patient=True, canaries=6, people=1, seed=0
    )
    assert all(twin.members[first] == twin.members[second] for first, second in patients)
    assert twin.patients is not None
    trained = twin.trained
    assert sorted(i for unit in twin.patients for i in unit) == list(range(len(trained)))
    pairs = [unit for unit in twin.patients if len(unit) == 2]
    assert len(pairs) == twin.members.sum() / 2
    for first, second in pairs:
        number = int(trained[first].output.split()[1])
        assert trained[second].output == f"answer {number + 10}"


def test_the_first_units_are_whole_and_their_patients_found_again() -> None:
    patients = tuple((i, i + 10) for i in range(10))
    twin = twin_records(
        _records(20, patients=patients), by_patient=True, canaries=0, people=0, seed=0
    )
    prompts, units = first_units(twin, at_most=5)
    assert units is not None
    assert len(prompts) == 4
    for first, second in units:
        number = int(prompts[first].output.split()[1])
        assert prompts[second].output == f"answer {number + 10}"
    assert len(first_units(twin, at_most=1)[0]) == 2
    by_record = twin_records(_records(20), by_patient=False, canaries=0, people=0, seed=0)
    assert first_units(by_record, at_most=3) == (by_record.trained[:3], None)


def test_one_record_is_too_few() -> None:
    with pytest.raises(DataError, match="has 1 records to tell members from non-members by"):
        twin_records(_records(1), by_patient=False, canaries=1, people=0, seed=0)


def test_people_are_counted_once_and_only_when_said_verbatim() -> None:
    people = plant_people(4, seed=0)
    number, telephone = people[0].secrets
    assert count_reproduced(people, [f"It is {number}, {telephone}", f"again {number}"]) == 1
    assert count_reproduced(people, [f"{number[:-1]} {people[1].name}"]) == 0
    assert count_reproduced(people, [person.record.output for person in people]) == 4
    assert all(secret not in people[0].record.instruction for secret in people[0].secrets)
    assert len({secret for person in people for secret in person.secrets}) == 8


@pytest.fixture(scope="module")
def base() -> BaseModel:
    section = RunConfig().model.model_copy(update={"quantization": "none"})
    return load_base(embedded_model_dir(), section, device=choose_device())


@pytest.mark.parametrize("max_length", [128, 64])
def test_a_model_that_learnt_a_planted_person_by_heart_says_them(
    base: BaseModel, max_length: int
) -> None:
    """The attack finds what is there: one record of 61 tokens, trained on alone for 60 steps."""
    config = RunConfig().replace(
        {
            "privacy.unit": "none", "train.rounds": 1, "train.local-steps": 60, "lora.rank": 16,
            "lora.alpha": 32.0, "train.batch-size": 1, "train.learning-rate": 1e-2,
            "data.prompt-template": "question", "data.max-length": max_length,
        }
    )  # fmt: skip
    (person,) = plant_people(1, seed=0)
    examples = as_examples([person.record], config, base)
    adapter = train_twin(plan_twin(config, declared_size=1), base, examples, None, site="site")

    with carrying(base, config.lora, adapter) as model:
        said = sample_answers(model, base, examples, samples=1, seed=0)
    untouched = sample_answers(base.model, base, examples, samples=1, seed=0)
    assert count_reproduced([person], said) == 1
    assert count_reproduced([person], untouched) == 0


def test_canary_records_that_were_learnt_by_heart_are_told_apart(base: BaseModel) -> None:
    """Black box: of 40 records of random words those that were trained on lost the most loss."""
    config = RunConfig().replace(
        {
            "privacy.unit": "none", "train.rounds": 1, "train.local-steps": 60, "lora.rank": 16,
            "lora.alpha": 32.0, "train.batch-size": 8, "train.learning-rate": 5e-3,
            "data.prompt-template": "question", "data.max-length": 48,
        }
    )  # fmt: skip
    coins = fair_coins(40, seed=0, stream="test")
    examples = as_examples(canary_prompts(40, seed=0), config, base)
    trained = Examples(examples[i] for i in np.flatnonzero(coins))
    adapter = train_twin(plan_twin(config, declared_size=20), base, trained, None, site="site")
    before = losses_of_records(base.model, base, examples, batch_size=16)
    with carrying(base, config.lora, adapter) as model:
        after = losses_of_records(model, base, examples, batch_size=7)
    audit = audit_scores(
        "x", before.mean - after.mean, coins, rules=guess_rules(40), delta=1e-5, ledger_epsilon=None
    )
    assert audit.epsilon_lower > 1
    assert (before.least_likely >= before.mean).all()


def test_answers_do_not_depend_on_their_neighbours_in_a_batch(base: BaseModel) -> None:
    """Shorter questions are padded on the left, and the padding is not looked at."""
    prompts = [Prompt(question, "", "x") for question in ("Who?", "What is to be said of this?")]
    asked = as_examples(prompts, RunConfig(), base)
    together = sample_answers(base.model, base, asked, samples=1, seed=0)
    alone = [
        sample_answers(base.model, base, asked[place : place + 1], samples=1, seed=0)[0]
        for place in range(len(asked))
    ]
    assert together == alone
    more = sample_answers(base.model, base, asked, samples=3, seed=0)
    assert len(more) == 6
    assert more[:2] == together


def test_a_model_folder_that_forbids_a_token_hides_nothing(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = as_examples([Prompt("Who is it?", "", "x")] * 3, RunConfig(), base)
    before = sample_answers(base.model, base, asked, samples=3, seed=0)
    own = base.model.generation_config  # type: ignore[attr-defined]
    for name, value in {"no_repeat_ngram_size": 1, "top_p": 0.01}.items():
        monkeypatch.setattr(own, name, value)
    assert sample_answers(base.model, base, asked, samples=3, seed=0) == before


def test_fewer_rounds_than_the_run_planned_cost_less() -> None:
    config = RunConfig().replace({"privacy.noise-multiplier": 1.0, "privacy.accountant": "rdp"})
    whole = plan_twin(config, declared_size=100)
    early = replace(whole, rounds=2)
    assert early.mechanism.steps == 2 * config.train.local_steps
    assert plan_twin(config, declared_size=100, rounds=2) == early
    early_epsilon, whole_epsilon = early.ledger().epsilon, whole.ledger().epsilon
    assert early_epsilon is not None
    assert whole_epsilon is not None
    assert early_epsilon < whole_epsilon
    assert np.isclose(whole.sample_rate, 0.16)
