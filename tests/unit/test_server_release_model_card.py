"""The model card: what is known of a run, in Hugging Face's form; what is not known, in as many words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from server.finished_run import load_finished_run
from server.release.base_license import BaseLicense
from server.release.card_facts import CardFacts, site_names
from server.release.evidence import Evidence
from server.release.model_card import make_card
from tests.unit.finished import PROTECTED, finished_config, write_finished_run

CENTRAL = {
    "base": {"loss": 4.0, "perplexity": 54.598, "token_accuracy": 0.25},
    "final": {"loss": 2.0, "perplexity": 7.389, "token_accuracy": 0.5},
}
EXPORT = {
    "format": "merged",
    "dtype": "float32",
    "loss": 2.01,
    "adapter_loss": 2.01,
    "run_loss": 2.0,
    "quantization": "nf4",
    "records": 8,
    "measured_on": "central records",
    "tolerance": 1e-4,
    "files": {"model.safetensors": "ef" * 32, "model.sig": None},
}
LANGUAGE = {"loss": 1.5, "perplexity": 4.48, "token_accuracy": 0.6}
EVALUATION: dict[str, Any] = {
    "records": 240,
    "models": {
        "base": {
            "language": {"loss": 3.0, "perplexity": 20.1, "token_accuracy": 0.3},
            "generation": {"exact_match": 0.0, "token_f1": 0.1, "rouge_l": 0.1, "bleu": 0.01, "records": 40},
            "options": None,
            "groups": [{"group": "bern", "records": 120, "loss": 3.1, "token_accuracy": 0.29}],
        },
        "final": {
            "language": LANGUAGE,
            "generation": {"exact_match": 0.2, "token_f1": 0.5, "rouge_l": 0.4, "bleu": 0.3, "records": 40},
            "options": {"labels": ["yes", "no"], "accuracy": 0.75, "macro_f1": 0.7, "records": 40},
            "groups": [
                {"group": "bern", "records": 120, "loss": 1.7, "token_accuracy": 0.55},
                {"group": "oslo", "records": 120, "loss": 1.3, "token_accuracy": 0.65},
            ],
        },
    },
    "group_column": "site",
    "worst_group": "bern",
    "questions": [{"question": "SECRET", "reference": "r", "base": "b", "final": "f"}],
    "federated": None,
}  # fmt: skip
ATTACK: dict[str, Any] = {
    "kind": "simulated twin",
    "run": "t",
    "site": "bern",
    "ledger": {"unit": "record", "epsilon": 8.0, "delta": 1e-5, "noise_multiplier": 0.8,
               "sample_rate": 0.1, "steps": 40},
    "audits": [{"name": "gradient canaries, white box", "canaries": 2000, "guesses": 400,
                "correct": 310, "confidence": 0.95, "epsilon_lower": 1.3, "delta": 1e-5,
                "ledger_epsilon_at_delta": 8.0}],
    "membership": [{"name": "loss threshold", "members": 2000, "nonmembers": 2000,
                    "confidence": 0.95, "auc": [0.52, 0.50, 0.54],
                    "tpr_at_1pct_fpr": [0.012, 0.007, 0.018], "roc": [[0, 0], [1, 1]]}],
    "planted": {"prompts": 200, "planted": 50, "reproduced": 0, "reproduced_by_base": 0,
                "samples_per_prompt": 1},
    "scope": "an audit of the training pipeline on a twin, not of this release's data",
}  # fmt: skip


@pytest.fixture
def facts(tiny_model_dir: Path, tmp_path: Path) -> CardFacts:
    """A run of bern and oslo under DP, evaluated and attacked."""
    write_finished_run(tmp_path / "run", tiny_model_dir, finished_config(), central=CENTRAL)
    run = load_finished_run(tmp_path / "run")
    return CardFacts(
        title="tiny-consilium",
        run=run,
        evidence=Evidence(EVALUATION, ATTACK),
        export=EXPORT,
        license=BaseLicense("apache-2.0", source="as the base model's card says"),
        names=site_names(run, named=False),
    )


def _of(facts: CardFacts, **summary: Any) -> CardFacts:
    """The same facts of a run whose summary says otherwise."""
    run = replace(facts.run, summary={**facts.run.summary, **summary})
    return replace(facts, run=run, names=site_names(run, named=False))


def test_its_metadata_is_read_back_by_the_hubs_own_library(
    facts: CardFacts, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(make_card(facts))
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "tiny"
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert {"federated-learning", "differential-privacy", "lora"} <= set(data.tags)
    assert data.model_name == "tiny-consilium"
    found = {(one.metric_name, one.metric_type): one.metric_value for one in data.eval_results}
    assert found[("perplexity, base in nf4", "perplexity")] == 4.48
    assert found[("exact match, base in nf4", "exact_match")] == 0.2
    assert found[("macro f1, base in nf4", "f1")] == 0.7
    assert data.metrics == ["accuracy", "bleu", "exact_match", "f1", "perplexity", "rouge"]


def test_a_reader_need_not_know_our_settings_to_read_the_figures(facts: CardFacts) -> None:
    card = make_card(facts)
    assert "| nf4, computed in bfloat16 on CUDA, float32 on a CPU |" in card
    assert "In brackets 95% confidence intervals; guessing is AUC 0.5 and 0.01." in card


def test_a_simulation_is_not_said_to_be_the_work_of_hospitals(facts: CardFacts) -> None:
    card = make_card(facts)
    assert "one machine, which held all records, imitated 2 hospitals" in card
    assert "premises" not in card
    # A coordinator's run has no hospitals' folders in its own.
    (facts.run.folder.path / "simulation").rename(facts.run.folder.path / "elsewhere")
    assert "2 hospitals trained this language model together" in make_card(facts)
    assert "each on its own premises" in make_card(facts)


def test_test_records_are_not_vouched_for_that_nobody_compared_with_the_sites(
    facts: CardFacts,
) -> None:
    card = make_card(facts)
    assert (
        "which the coordinator chose (whether a site trained on any of them, nobody checked)"
        in card
    )
    assert "no site trained on" not in card


def test_it_names_what_each_site_spent_and_no_site(facts: CardFacts) -> None:
    card = make_card(facts)
    assert "| site 1 | a record | 6.500 | 1e-05 | 0.8 | 40 | prv |" in card
    assert "| site 2 | a record | 7.500 | 1e-05 | 0.8 | 40 | prv |" in card
    assert "under differential privacy" in card
    assert "These are the sites' own signed words" in card
    for name in ("bern", "oslo"):
        assert name not in card.lower()


def test_sites_are_named_where_that_is_asked_for(facts: CardFacts) -> None:
    card = make_card(replace(facts, names=site_names(facts.run, named=True)))
    assert "| bern | a record | 7.500 |" in card
    assert "2: bern, oslo" in card
    assert "| bern (worst) |" in card


def test_a_sites_number_does_not_follow_its_name(facts: CardFacts) -> None:
    rows = {"aarau": {**PROTECTED, "epsilon": 9.0}, "zug": {**PROTECTED, "epsilon": 1.0}}
    assert _of(facts, sites=["aarau", "zug"], privacy=rows).names == {
        "zug": "site 1",
        "aarau": "site 2",
    }


def test_sites_that_spent_the_same_are_numbered_by_chance(facts: CardFacts) -> None:
    """Else who knows their names knows their numbers. In 40 draws one order alone: 2 in 2^40."""
    rows = {"aarau": PROTECTED, "zug": PROTECTED}
    drawn = {_of(facts, sites=["aarau", "zug"], privacy=rows).names["zug"] for _ in range(40)}
    assert drawn == {"site 1", "site 2"}


@pytest.mark.parametrize("named", [False, True])
def test_a_group_that_is_named_like_a_hospital_is_numbered_too(
    facts: CardFacts, named: bool
) -> None:
    """A hospital that took no part, a name spelled otherwise, the name of a file."""
    names = ["Bern Hospital", "north/harbour-records", "oslo"]
    groups = [
        {"group": name, "records": i, "loss": 9.0 - i, "token_accuracy": 0.5}
        for i, name in enumerate(names)
    ]
    final = {**EVALUATION["models"]["final"], "groups": groups}
    evaluation = {**EVALUATION, "models": {"base": {}, "final": final}, "worst_group": names[0]}
    facts = replace(facts, names=site_names(facts.run, named=named))
    card = make_card(replace(facts, evidence=Evidence(evaluation, None)))
    for name in names:
        assert (name in card) == named
    if not named:
        assert "| site 1 | 2 | 7.000 |" in card
        assert "| group 1 | 1 | 8.000 |" in card
        assert "| group 2 (worst) | 0 | 9.000 |" in card


def test_a_run_without_protection_says_so_in_bold(facts: CardFacts) -> None:
    open_rows = {name: {**PROTECTED, "unit": "none", "epsilon": None} for name in ("bern", "oslo")}
    card = make_card(_of(facts, privacy=open_rows))
    assert "**This model was trained without differential privacy.**" in card
    assert "rounds, **without differential privacy**, with" in card
    assert "differential-privacy" not in card.split("---")[1]
    assert "Epsilon bounds" not in card


@pytest.mark.parametrize("privacy", [{"bern": PROTECTED}, {"bern": PROTECTED, "oslo": None}])
def test_one_site_without_protection_is_named_in_bold(
    facts: CardFacts, privacy: dict[str, Any]
) -> None:
    """Whether its row says so, or there is none."""
    if "oslo" in privacy:
        privacy = {**privacy, "oslo": {**PROTECTED, "unit": "none", "epsilon": None}}
    card = make_card(_of(facts, privacy=privacy))
    assert "**1 of 2 sites trained without differential privacy**: site 2." in card
    assert "| site 1 | a record | 7.500 |" in card
    assert "**without differential privacy**, with" in card
    assert "differential-privacy" not in card.split("---")[1]


def test_what_the_evaluation_found_stands_beside_the_base(facts: CardFacts) -> None:
    card = make_card(facts)
    assert "On 240 central test records" in card
    assert "| loss | 3.000 | 1.500 |" in card
    assert "| token F1 (on 40 of them) | 0.100 | 0.500 |" in card
    assert "| accuracy of the choice (on 40 of them) | - | 0.750 |" in card
    assert "| site 2 (worst) | 120 | 1.700 | 3.100 | 0.550 |" in card
    assert "SECRET" not in card


def test_records_that_are_not_the_runs_own_are_not_called_so(facts: CardFacts) -> None:
    evidence = replace(facts.evidence, evaluation={**EVALUATION, "other_records": True})
    card = make_card(replace(facts, evidence=evidence))
    assert "On 240 test records that were named for this evaluation, which the coordinator" in card
    assert "name: the coordinator's test records that were named for this evaluation" in card
    assert "central test records" not in card


def test_without_an_evaluation_the_runs_own_loss_stands(facts: CardFacts) -> None:
    card = make_card(replace(facts, evidence=Evidence(None, None)))
    assert "| loss | 4.000 | 2.000 |" in card
    assert "No attack was run" in card
    assert "How it does for each site or group was not measured." in card


def test_without_any_it_says_so(facts: CardFacts) -> None:
    nothing = _of(replace(facts, evidence=Evidence(None, None)), central={"base": {}, "final": {}})
    card = make_card(replace(nothing, export={**EXPORT, "measured_on": "fixed texts"}))
    assert "**It was not evaluated:**" in card
    assert "the fixed texts above show that the files are the model" in card
    assert "model-index" not in card


@pytest.mark.parametrize(
    "federated", [None, {"sites": {}, "all": None, "refused": {"bern": "policy"}}]
)
def test_a_run_without_central_records_still_has_a_card(
    facts: CardFacts, federated: dict[str, Any] | None
) -> None:
    """Every run writes an evaluation.json; without central records it is of no models."""
    evaluation = {**EVALUATION, "records": 0, "models": None, "federated": federated}
    nothing = _of(facts, central={"base": {}, "final": {}})
    card = make_card(replace(nothing, evidence=Evidence(evaluation, None)))
    assert "**It was not evaluated:**" in card
    assert ("no site that was asked counted any" in card) == (federated is not None)
    assert "How it does for each site or group was not measured." in card


def test_an_evaluation_without_groups_is_not_said_to_have_any(facts: CardFacts) -> None:
    models = {which: {**EVALUATION["models"][which], "groups": []} for which in ("base", "final")}
    card = make_card(replace(facts, evidence=Evidence({**EVALUATION, "models": models}, None)))
    assert "| loss | 3.000 | 1.500 |" in card
    assert "How it does for each site or group was not measured." in card


def test_an_evaluation_at_the_sites_is_said_to_be_outside_epsilon(facts: CardFacts) -> None:
    sums = {"records": 500, "tokens": 9000, "loss": 1.9, "token_accuracy": 0.5,
            "base_loss": 3.9, "base_token_accuracy": 0.2}  # fmt: skip
    federated = {"sites": {"bern": sums}, "all": sums, "outside_epsilon": True}
    card = make_card(
        replace(facts, evidence=Evidence({**EVALUATION, "federated": federated}, None))
    )
    assert "At the sites, on 500 records of their own: loss 1.900 (untouched base 3.900)" in card
    assert "outside epsilon" in card
    assert "bern" not in card


def test_attacks_are_reported_with_what_they_are_of(facts: CardFacts) -> None:
    card = make_card(facts)
    assert "On a simulated twin of this training, at site 2, ledger" in card
    assert "epsilon 8.00 at delta 1e-05: an audit of the training pipeline" in card
    assert "| gradient canaries, white box | 2000 | 400, 310 | 1.30 (95%) | 8.000 |" in card
    assert "| loss threshold | 2000, 2000 | 0.520 (0.500 to 0.540) |" in card
    assert "Of 50 planted identifiers it reproduced 0 on 200 prompts, its base 0." in card


@pytest.mark.parametrize(
    ("lower", "rehearsed", "said"),
    [
        (9.0, 3.0, "gave away more than the ledger counts"),
        (0.0, 3.0, "it is no sign of protection"),
        (0.0, None, ""),
    ],
)
def test_an_audit_that_went_badly_is_said_in_bold(
    facts: CardFacts, lower: float, rehearsed: float | None, said: str
) -> None:
    audit = {
        **ATTACK["audits"][0],
        "ledger_epsilon_at_delta": 8.0,
        "epsilon_lower": lower,
        "epsilon_rehearsed": rehearsed,
    }
    card = make_card(replace(facts, evidence=Evidence(None, {**ATTACK, "audits": [audit]})))
    bold = [line for line in card.splitlines() if line.startswith(f"**{audit['name']}: ")]
    assert [said in line for line in bold] == ([True] if said else [])


def test_an_attack_on_a_run_without_protection_has_no_epsilon(facts: CardFacts) -> None:
    attack = {**ATTACK, "ledger": {**ATTACK["ledger"], "epsilon": None}, "planted": None}
    attack["audits"] = [{**ATTACK["audits"][0], "ledger_epsilon_at_delta": None}]
    card = make_card(replace(facts, evidence=Evidence(None, attack)))
    assert "without protection: an audit" in card
    assert "| 1.30 (95%) | infinite |" in card
    assert "planted" not in card


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        (BaseLicense("unknown"), "unknown: neither its folder nor whoever made this release says it"),
        (BaseLicense("other", "hospital-terms", "x"), "license_name: hospital-terms"),
    ],
)  # fmt: skip
def test_a_licence_that_is_not_known_or_its_own_is_said_plainly(
    facts: CardFacts, license: BaseLicense, expected: str
) -> None:
    card = make_card(replace(facts, license=license))
    assert f"license: {license.license}\n" in card
    assert expected in card


def test_no_text_leaves_its_cell_or_its_fence(facts: CardFacts) -> None:
    evaluation = {**EVALUATION, "models": {"base": {}, "final": {
        "language": LANGUAGE,
        "groups": [{"group": "a|b<script>\n# c", "records": 1, "loss": 1.0, "token_accuracy": 0.5}],
    }}}  # fmt: skip
    config = facts.run.config.replace({"data.prompt-template": "```\n# {instruction}\n"})
    run = replace(facts.run, config=config)
    facts = replace(facts, names=site_names(run, named=True))
    card = make_card(replace(facts, run=run, evidence=Evidence(evaluation, None)))
    assert "| a\\|b&lt;script> # c | 1 |" in card
    assert "````text\n```\n# {instruction}\n\n````" in card


def test_an_adapters_card_loads_it_on_its_base(facts: CardFacts) -> None:
    card = make_card(replace(facts, export={**EXPORT, "format": "adapter"}))
    assert "library_name: peft" in card
    assert "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), DIR)" in card


def test_it_names_every_digest(facts: CardFacts) -> None:
    card = make_card(facts)
    for digest in (facts.run.base_digest, facts.run.adapter_digest, "ef" * 32):
        assert digest in card
    # model.sig has none: it comes last.
    assert "| `model.sig` |" not in card
