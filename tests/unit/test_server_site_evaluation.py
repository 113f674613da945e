"""Evaluation at the sites, from the coordinator's side: sums, who gave none, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.audit_log import read_audit_log
from common.errors import ScreeningError
from common.records import Reply, SiteHeads
from server.audit import take_in_heads
from server.evaluation import AtSites
from server.history import read_events
from server.site_evaluation import screen_sums
from tests.unit.scenarios import run, site_names, write_scenario

# Each number in its order: two models, 10 records, 100 answer tokens.
SUMS = {
    "evaluation-records": 10.0,
    "evaluation-tokens": 100.0,
    "evaluation-nll": 150.0,
    "evaluation-correct": 60.0,
    "evaluation-base-nll": 350.0,
    "evaluation-base-correct": 40.0,
}


def _reply(**changes: float) -> Reply:
    named = {f"evaluation-{name.replace('_', '-')}": value for name, value in changes.items()}
    numbers = {**SUMS, **named}
    return Reply("north", "run-1", 3, 1, "0" * 64, numbers=numbers)


def test_sums_become_metrics_by_hand() -> None:
    found = screen_sums(_reply(), max_length=20).as_json()
    assert found["loss"] == pytest.approx(1.5)
    assert found["token_accuracy"] == pytest.approx(0.6)
    assert found["base_loss"] == pytest.approx(3.5)
    assert found["base_token_accuracy"] == pytest.approx(0.4)
    assert (found["records"], found["tokens"]) == (10, 100)


@pytest.mark.parametrize(
    "changes",
    [
        {"records": 0.0},
        {"tokens": 0.0},
        # Ten records hold 200 tokens at most; a digit of rounding may double that.
        {"tokens": 500.0},
        {"records": 1e308, "tokens": 1e308, "nll": 1.7e308},
        {"nll": -1.0},
        {"nll": 1e9},
        {"base_nll": 1e9},
        {"correct": 101.0},
        {"base_correct": -1.0},
    ],
)
def test_sums_that_no_counting_gives_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ScreeningError, match="sums that no counting gives"):
        screen_sums(_reply(**changes), max_length=20)


def test_the_largest_sums_that_pass_can_be_added_up() -> None:
    most = _reply(records=1e8, tokens=2e14, nll=28 * 2e14, base_nll=28 * 2e14)
    found = screen_sums(most, max_length=10**6)
    assert AtSites({"north": found, "south": found}, {}).as_json()["all"]["records"] == 2 * 10**8


def test_sums_of_which_one_is_missing_are_refused() -> None:
    numbers = {name: value for name, value in SUMS.items() if name != "evaluation-base-nll"}
    with pytest.raises(ScreeningError, match="no evaluation-base-nll"):
        screen_sums(Reply("north", "run-1", 3, 1, "0" * 64, numbers=numbers), max_length=20)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A run without central data, whose first site counts and whose second does not allow it."""
    folder = write_scenario(tmp_path_factory.mktemp("sites") / "two", tiny_model_dir)
    for name in site_names(folder):
        path = folder / "sites" / name / "records.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for place, row in enumerate(rows):
            row["split"] = "test" if place % 3 == 0 else "train"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, released in zip(site_names(folder), ('"evaluation"', ""), strict=True):
        path = folder / "sites" / name / "site.toml"
        policy = f"[policy]\nrelease-metrics = [{released}]\nmin-evaluation-records = 4\n"
        path.write_text(path.read_text() + policy)
    out = tmp_path_factory.mktemp("evaluated") / "run"
    run(folder, out, evaluation__central_data="", evaluation__at_sites=True)
    return out


def _evaluation(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return content


def test_a_run_without_test_records_is_measured_where_sites_allow_it(evaluated: Path) -> None:
    content = _evaluation(evaluated)
    assert (content["models"], content["records"], content["questions"]) == (None, 0, [])
    federated = content["federated"]
    counting, silent = sorted(path.name for path in (evaluated / "simulation" / "sites").iterdir())
    assert federated["outside_epsilon"] is True
    assert federated["refused"] == {silent: "site-policy"}
    assert list(federated["sites"]) == [counting]
    assert federated["sites"][counting] == federated["all"]
    assert federated["all"]["records"] == 4
    # Two rounds of training made it better than its base, on records that were never trained on.
    assert federated["all"]["loss"] < federated["all"]["base_loss"]


def test_both_sides_have_it_on_record(evaluated: Path) -> None:
    (told,) = [
        e for e in read_events(evaluated / "history.jsonl") if e["event"] == "evaluated-at-sites"
    ]
    counting = told["sites"][0]
    assert told["round"] == 2
    site_log = read_audit_log(
        evaluated / "simulation" / "sites" / counting / "state" / "audit.jsonl"
    )
    events = [entry.event for entry in site_log]
    assert events.index("evaluating") < len(events) - 1 - events[::-1].index("sent")
    (path,) = evaluated.glob("simulation/**/coordinator/audit.jsonl")
    kinds = [
        (entry.event, entry.fields["site"])
        for entry in read_audit_log(path)
        if entry.fields.get("kind") == "evaluate"
    ]
    sites = sorted(p.name for p in (evaluated / "simulation" / "sites").iterdir())
    assert kinds == [("task", site) for site in sites] + [("reply", site) for site in sites]


def test_a_site_restored_to_before_its_evaluation_is_behind(evaluated: Path) -> None:
    (path,) = evaluated.glob("simulation/**/coordinator/audit.jsonl")
    counting = next(iter(_evaluation(evaluated)["federated"]["sites"]))
    log = list(read_audit_log(path))
    (reply,) = [
        entry
        for entry in log
        if (entry.event, entry.fields.get("kind"), entry.fields.get("site"))
        == ("reply", "evaluate", counting)
    ]
    seen: dict[str, SiteHeads] = {}
    for entry in log:
        take_in_heads(seen, entry)
    # Else it would have forgotten that its one evaluation of this run was given, and nobody would notice.
    assert seen[counting].audit.count == reply.fields["heads"]["audit"]["count"]


def test_nobody_is_asked_unless_the_run_says_so(tmp_path: Path, scenario: Path) -> None:
    run(scenario, tmp_path / "run", train__rounds=1)
    assert _evaluation(tmp_path / "run")["federated"] is None
