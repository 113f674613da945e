"""What a site counts for a coordinator: only where it allows it, only enough test records, once a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from client.turn import Caller
from common.audit_log import read_audit_log
from common.config import read_toml
from common.errors import CancelledError, ConfigError
from common.lora import carrying
from common.metrics import TokenSums
from common.model import choose_device, load_base
from common.prompts import Prompt, resolve_template, tokenize_all
from common.record_sums import record_sums
from common.records import Reply, Task, open_reply
from tests.unit.adapters import moved
from tests.unit.hospital import Hospital, make_hospital

ALLOWED: dict[str, Any] = {
    "release-metrics": ["evaluation"],
    "metric-digits": 12,
    "min-evaluation-records": 5,
}


def _hospital(
    tmp_path: Path,
    model_dir: Path,
    *,
    policy: Mapping[str, Any] = ALLOWED,
    data: Mapping[str, Any] | None = None,
    num_test: int = 6,
    with_split: bool = True,
) -> Hospital:
    hospital = make_hospital(tmp_path / "north", model_dir, policy=policy, data=data)
    rows = [
        json.dumps(
            {"instruction": f"What of case {i}?", "output": f"Case {i} is well.", **split}
            # The test records are of two patients.
            | {"patient": f"p{i if i < 12 else i % 2}"}
        )
        for i, split in enumerate(
            [{"split": "train"} if with_split else {}] * 12
            + [{"split": "test"} if with_split else {}] * num_test
        )
    ]
    (hospital.folder / "records.jsonl").write_text("\n".join(rows) + "\n")
    return hospital


def _answer(hospital: Hospital, task: Task) -> Reply:
    site = hospital.open()
    reply = site.answer(hospital.seal(task))
    return open_reply(reply, task=task, site="north", public_hex=site.public_key)


def _trained(hospital: Hospital) -> Hospital:
    assert _answer(hospital, hospital.task(1)).error_code == ""
    return hospital


def _events(hospital: Hospital) -> list[str]:
    return [entry.event for entry in read_audit_log(hospital.folder / "state" / "audit.jsonl")]


def test_sums_are_those_of_base_and_adapter_on_the_test_split_alone(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    hospital = _trained(_hospital(tmp_path, tiny_model_dir))
    adapter = moved(hospital.adapter, by=0.05)
    hospital = Hospital(
        hospital.folder, hospital.coordinator, hospital.config, hospital.base_digest, adapter
    )

    reply = _answer(hospital, hospital.task(3, kind="evaluate"))

    base = load_base(tiny_model_dir, hospital.config.model, device=choose_device("cpu"))
    examples = tokenize_all(
        [Prompt(f"What of case {i}?", "", f"Case {i} is well.") for i in range(12, 18)],
        tokenizer=base.tokenizer,
        template=resolve_template("question"),
        max_length=48,
    )
    untouched = TokenSums.total(record_sums(base.model, base, examples, batch_size=2))
    with carrying(base, hospital.config.lora, adapter) as model:
        result = TokenSums.total(record_sums(model, base, examples, batch_size=2))
    assert reply.error_code == ""
    assert (reply.adapter_digest, reply.privacy) == ("", None)
    assert dict(reply.numbers) == pytest.approx(
        {
            "evaluation-records": 6,
            "evaluation-tokens": result.tokens,
            "evaluation-nll": result.nll,
            "evaluation-correct": result.correct,
            "evaluation-base-nll": untouched.nll,
            "evaluation-base-correct": untouched.correct,
        },
        rel=1e-6,
    )
    assert result.nll != pytest.approx(untouched.nll, rel=1e-4)
    # Before any record was read, and what left.
    assert _events(hospital)[-2:] == ["evaluating", "sent"]


def test_numbers_leave_as_rounded_as_the_policy_says(tmp_path: Path, tiny_model_dir: Path) -> None:
    policy = {**ALLOWED, "metric-digits": 2}
    hospital = _trained(_hospital(tmp_path, tiny_model_dir, policy=policy))
    numbers = _answer(hospital, hospital.task(3, kind="evaluate")).numbers
    assert all(value == float(f"{value:.2g}") for value in numbers.values())


def test_the_same_evaluation_may_be_asked_again_and_no_other(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    hospital = _trained(_hospital(tmp_path, tiny_model_dir))
    first = _answer(hospital, hospital.task(3, kind="evaluate"))
    again = _answer(hospital, hospital.task(3, kind="evaluate", attempt=2))
    assert dict(again.numbers) == dict(first.numbers)
    other = Hospital(
        hospital.folder,
        hospital.coordinator,
        hospital.config,
        hospital.base_digest,
        moved(hospital.adapter, by=0.5),
    )
    refused = _answer(other, other.task(3, kind="evaluate"))
    assert (refused.error_code, dict(refused.numbers)) == ("policy", {})
    assert _answer(hospital, hospital.task(2, kind="evaluate")).error_code == "policy"


def test_counting_stops_at_the_hours_that_the_policy_allows(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    hospital = _trained(_hospital(tmp_path, tiny_model_dir))
    site_file = hospital.folder / "site.toml"
    settings = read_toml(site_file)
    settings["policy"]["max-hours"] = 1e-9
    site_file.write_text(tomli_w.dumps(settings))
    reply = _answer(hospital, hospital.task(3, kind="evaluate"))
    assert (reply.error_code, dict(reply.numbers)) == ("training", {})


def test_asked_again_after_the_records_changed_the_answer_is_the_first_one(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    hospital = _trained(_hospital(tmp_path, tiny_model_dir))
    first = _answer(hospital, hospital.task(3, kind="evaluate"))
    records = hospital.folder / "records.jsonl"
    new = {"instruction": "What of case 99?", "output": "Case 99 is ill.", "split": "test"}
    records.write_text(records.read_text() + json.dumps(new) + "\n")
    again = _answer(hospital, hospital.task(3, kind="evaluate", attempt=2))
    # Else the difference is case 99.
    assert dict(again.numbers) == dict(first.numbers)
    assert _events(hospital).count("evaluating") == 1


def test_one_that_was_cut_short_is_counted_when_asked_again(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    hospital = _trained(_hospital(tmp_path, tiny_model_dir))

    def gone(step: int) -> None:
        raise CancelledError("cut short")

    task = hospital.task(3, kind="evaluate")
    hospital.open().answer(hospital.seal(task), caller=Caller(on_step=gone))
    assert _events(hospital)[-2:] == ["evaluating", "refused"]
    assert _answer(hospital, hospital.task(3, kind="evaluate")).numbers["evaluation-records"] == 6


def test_no_more_runs_are_evaluated_than_the_policy_says(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    hospital = _hospital(tmp_path, tiny_model_dir, policy={**ALLOWED, "max-evaluations": 2})
    # Runs of next to no epsilon.
    cheap = {"privacy.noise-multiplier": 1000.0, "train.local-steps": 1, "train.batch-size": 1}
    codes = []
    for run_uid in ("a", "b", "c"):
        assert _answer(hospital, hospital.task(1, run_uid=run_uid, settings=cheap)).error_code == ""
        task = hospital.task(1, run_uid=run_uid, settings=cheap, kind="evaluate")
        codes.append(_answer(hospital, task).error_code)
    assert codes == ["", "", "policy"]
    again = hospital.task(1, run_uid="b", settings=cheap, kind="evaluate")
    assert _answer(hospital, again).error_code == ""


def test_a_damaged_note_gives_no_second_evaluation(tmp_path: Path, tiny_model_dir: Path) -> None:
    hospital = _trained(_hospital(tmp_path, tiny_model_dir))
    _answer(hospital, hospital.task(3, kind="evaluate"))
    (hospital.folder / "state" / "evaluations" / "run-1").write_text("x")
    assert _answer(hospital, hospital.task(3, kind="evaluate")).error_code == "config"


def test_nothing_is_counted_for_a_run_that_trained_nothing_here(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    hospital = _hospital(tmp_path, tiny_model_dir)
    reply = _answer(hospital, hospital.task(3, kind="evaluate"))
    assert reply.error_code == "policy"
    assert "evaluating" not in _events(hospital)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"policy": {**ALLOWED, "release-metrics": ["train-loss"]}}, "policy.release-metrics"),
        ({"policy": {**ALLOWED, "min-evaluation-records": 7}}, "min-evaluation-records = 7"),
        ({"data": {"evaluation-split": "train"}}, "what this run trained on"),
        ({"data": {"unit": "patient", "patient-id": "patient"}}, "6 usable records of 2 patients"),
        ({"data": {"evaluation-split": "val"}}, "none of them of split 'val'"),
        ({"with_split": False}, "no column 'split'"),
    ],
)
def test_what_the_site_did_not_allow_or_cannot_tell_is_refused(
    tmp_path: Path,
    tiny_model_dir: Path,
    change: dict[str, Any],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hospital = _hospital(tmp_path, tiny_model_dir, **change)
    unit = change.get("data", {}).get("unit", "record")
    settings = {"privacy.unit": unit, "privacy.noise-multiplier": 100.0}
    assert _answer(hospital, hospital.task(1, settings=settings)).error_code == ""
    reply = _answer(hospital, hospital.task(3, kind="evaluate", settings=settings))
    assert reply.error_code in ("policy", "data")
    assert dict(reply.numbers) == {}
    assert said in caplog.text


def test_a_run_that_trained_on_every_split_is_not_evaluated(
    tmp_path: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hospital = _hospital(tmp_path, tiny_model_dir)
    every = {"data.split": ""}
    assert _answer(hospital, hospital.task(1, settings=every)).error_code == ""
    reply = _answer(hospital, hospital.task(3, kind="evaluate", settings=every))
    assert (reply.error_code, dict(reply.numbers)) == ("policy", {})
    assert "what this run trained on" in caplog.text


@pytest.mark.parametrize("trained", ["test", ""])
def test_what_a_run_trained_on_is_not_what_its_last_task_says(
    tmp_path: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture, trained: str
) -> None:
    """Trained on the test records, and then called a run of the others."""
    hospital = _hospital(tmp_path, tiny_model_dir)
    settings = {"data.split": trained}
    assert _answer(hospital, hospital.task(1, settings=settings)).error_code == ""
    assert _answer(hospital, hospital.task(2)).error_code == ""
    reply = _answer(hospital, hospital.task(3, kind="evaluate"))
    assert (reply.error_code, dict(reply.numbers)) == ("policy", {})
    assert "what run run-1 trained on here, whatever its task says now" in caplog.text
    assert "evaluating" not in _events(hospital)


def test_a_damaged_note_of_what_was_trained_on_gives_no_evaluation(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    hospital = _trained(_hospital(tmp_path, tiny_model_dir))
    note = hospital.folder / "state" / "trained-splits" / "run-1"
    assert json.loads(note.read_bytes()) == ["train"]
    note.write_text("[1]")
    assert _answer(hospital, hospital.task(3, kind="evaluate")).error_code == "config"


def test_a_site_must_name_the_split_that_is_counted(tmp_path: Path, tiny_model_dir: Path) -> None:
    # "" would take the split that the task names.
    hospital = _hospital(tmp_path, tiny_model_dir, data={"evaluation-split": ""})
    with pytest.raises(ConfigError, match="evaluation-split"):
        hospital.open()


def test_the_model_is_known_to_be_in_memory_and_every_batch_is_told(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    hospital = _trained(_hospital(tmp_path, tiny_model_dir))
    site, told = hospital.open(), list[int]()
    assert site.loaded_base == ""
    task = hospital.task(3, kind="evaluate", settings={"train.micro-batch-size": 4})
    site.answer(hospital.seal(task), caller=Caller(on_step=told.append))
    # Six records of two models: no more at once than training holds.
    assert told == [1, 2, 3, 4]
    # Else the agent would never let it go.
    assert site.loaded_base == hospital.base_digest


def test_a_declined_run_is_not_evaluated(tmp_path: Path, tiny_model_dir: Path) -> None:
    hospital = _hospital(tmp_path, tiny_model_dir, policy={**ALLOWED, "approval": "ask"})
    assert _answer(hospital, hospital.task(1)).error_code == "approval"
    hospital.open().approve("run-1")
    _trained(hospital)
    hospital.open().decline("run-1")
    assert _answer(hospital, hospital.task(3, kind="evaluate")).error_code == "policy"


def test_another_coordinator_may_not_evaluate_the_run(tmp_path: Path, tiny_model_dir: Path) -> None:
    hospital = _trained(_hospital(tmp_path, tiny_model_dir))
    owner = hospital.folder / "state" / "run-owners" / "run-1"
    owner.write_text("0" * 64)
    assert _answer(hospital, hospital.task(3, kind="evaluate")).error_code == "policy"


def test_evaluating_charges_nothing(tmp_path: Path, tiny_model_dir: Path) -> None:
    hospital = _trained(_hospital(tmp_path, tiny_model_dir))
    before = hospital.open().ledger.head()
    _answer(hospital, hospital.task(3, kind="evaluate"))
    assert hospital.open().ledger.head() == before


def test_evaluation_numbers_leave_in_no_other_way() -> None:
    from client.egress import check_numbers
    from common.errors import EgressError

    with pytest.raises(EgressError, match="evaluation-nll"):
        check_numbers({"evaluation-nll": 1.0}, released=("train-loss",), digits=3)
