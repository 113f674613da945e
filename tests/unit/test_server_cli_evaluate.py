"""`consilium server evaluate`, as a person gives it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.errors import ConfigError, DataError
from common.metrics import LanguageMetrics
from server.cli import app
from server.evaluation.results import Evaluation, ModelResults
from tests.unit.finished import finished_config, write_finished_run


@pytest.fixture(autouse=True)
def _a_hundred_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.cli.console._width", 100)


def _records(path: Path, *answers: str) -> Path:
    rows = [
        {"instruction": f"Case {i}?", "output": answer, "site": "bern" if i % 2 else "oslo"}
        for i, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    central = _records(tmp_path / "central.jsonl", "yes", "no", "maybe", "no")
    config = finished_config(evaluation__max_new_tokens=4)
    files = (central,)
    return write_finished_run(tmp_path / "run", tiny_model_dir, config, central_files=files).path


def _evaluate(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def _written(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "evaluation.json").read_text())
    return content


def test_a_report_that_is_there_shows_what_was_measured_since(run_dir: Path) -> None:
    report = run_dir / "report.html"
    assert "report.html" not in _evaluate(run_dir)
    assert not report.exists()
    report.write_text("of before")
    said = _evaluate(run_dir, "--set", "evaluation.metrics=generation")
    assert f"Drew {report} again, with it" in said.replace("\n", "")
    assert "ROUGE-L" in report.read_text()


def test_everything_that_is_asked_for_is_shown_and_written(run_dir: Path) -> None:
    said = _evaluate(run_dir, "--set", "evaluation.metrics=generation,options")
    assert "Confusion, of the result" in said
    for words in ("4 test records", "ROUGE-L", "By site", "(worst)", "chosen"):
        assert words in said
    assert "Answers side by side" in said
    assert f"Wrote {run_dir / 'evaluation.json'}" in said.replace("\n", "")
    assert max(map(len, said.splitlines())) <= max(100, len(f"Wrote {run_dir}/evaluation.json"))
    content = _written(run_dir)
    assert content["models"]["final"]["options"]["labels"] == ["maybe", "no", "yes"]
    assert [g["group"] for g in content["models"]["final"]["groups"]] == ["bern", "oslo"]
    assert content["worst_group"] in ("bern", "oslo")
    assert content["round"] == 1
    assert len(content["questions"]) == 4


def test_other_records_and_json(run_dir: Path, tmp_path: Path) -> None:
    other = _records(tmp_path / "other, and more.jsonl", "a", "b")
    said = _evaluate(run_dir, "--data", other, "--json")
    assert json.loads(said) == _written(run_dir)
    assert json.loads(said)["records"] == 2
    assert json.loads(said)["other_records"] is True
    _evaluate(run_dir)
    assert _written(run_dir)["other_records"] is False
    # The run's own, named by hand.
    _evaluate(run_dir, "--data", tmp_path / "central.jsonl")
    assert _written(run_dir)["other_records"] is False


def test_json_draws_a_report_that_is_there_again_too(run_dir: Path, tmp_path: Path) -> None:
    page = run_dir / "report.html"
    page.write_text("old")
    other = _records(tmp_path / "other.jsonl", "a", "b")
    json.loads(_evaluate(run_dir, "--data", other, "--json"))
    ours = "On the coordinator&#39;s test set"
    assert "On test records that were named for this evaluation, 2 records" in page.read_text()
    assert ours not in page.read_text()
    _evaluate(run_dir)
    assert "named for this evaluation" not in page.read_text()
    assert ours in page.read_text()


def test_what_sites_counted_once_is_kept(run_dir: Path) -> None:
    _evaluate(run_dir)
    path = run_dir / "evaluation.json"
    counted = {"sites": {}, "all": None, "refused": {"bern": "site-policy"}}
    path.write_text(json.dumps({**_written(run_dir), "federated": counted}))
    _evaluate(run_dir)
    assert _written(run_dir)["federated"] == counted
    # Without its checkpoint the same adapter has another digest.
    shutil.rmtree(run_dir / "checkpoints")
    _evaluate(run_dir)
    assert _written(run_dir)["federated"] == counted
    path.write_text(json.dumps({**_written(run_dir), "round": 7}))
    _evaluate(run_dir)
    assert _written(run_dir)["federated"] is None


def test_brackets_in_records_and_answers_are_no_markup(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    rows = [
        {"instruction": f"[/INST] {label}?", "output": label, "ward": f"ward {label}"}
        for label in ("[/yes]", "[/no]")
    ]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["evaluation.metrics=options", "evaluation.group-by=ward"]
    options = [word for setting in settings for word in ("--set", setting)]
    said = _evaluate(run_dir, "--data", other, *options)
    for words in ("[/INST]", "ward [/no]", "[/yes]"):
        assert words in said


def test_what_is_not_finite_is_null_in_the_file(tmp_path: Path) -> None:
    diverged = ModelResults(LanguageMetrics(math.nan, math.inf, 0.0))
    found = Evaluation("run-1", 1, "0" * 64, "0" * 64, 3, (diverged, diverged))
    found.write(tmp_path / "evaluation.json")
    language = _written(tmp_path)["models"]["final"]["language"]
    assert language == {"loss": None, "perplexity": None, "token_accuracy": 0.0}


def test_what_cannot_be_is_said_before_anything_is_measured(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set train.rounds: only evaluation"):
        _evaluate(run_dir, "--set", "train.rounds=9")
    with pytest.raises(ConfigError, match="'bleurt' is none of generation, loss, options"):
        _evaluate(run_dir, "--set", "evaluation.metrics=bleurt")
    with pytest.raises(DataError, match="4 test records answer none"):
        _evaluate(run_dir, "--set", "evaluation.metrics=options", "--set", "evaluation.labels=x,y")
    with pytest.raises(DataError, match="no records at"):
        _evaluate(run_dir, "--data", tmp_path / "nothing.jsonl")
    (tmp_path / "central.jsonl").unlink()
    with pytest.raises(ConfigError, match="name some with --data"):
        _evaluate(run_dir)
    assert not (run_dir / "evaluation.json").exists()
