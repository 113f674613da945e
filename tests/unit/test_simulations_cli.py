"""`consilium simulate`: from init to compare, exit codes, and what the terminal says."""

from __future__ import annotations

import csv
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import simulations.compare
from common import cli
from tests.unit.scenarios import site_names, write_scenario


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _logging_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command sets up logging and the environment for a process of its own."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    packages = ["common", "client", "server", "simulations"]
    packages += ["transformers", "bitsandbytes", "peft", "flwr"]
    levels = {name: logging.getLogger(name).level for name in packages}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


class Command:
    """Runs `consilium simulate ...` in this process and returns how it ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *words: str | Path) -> Ended:
        self._monkeypatch.setattr(sys, "argv", ["consilium", "simulate", *map(str, words)])
        self._monkeypatch.setenv("COLUMNS", "100")
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = self._capsys.readouterr()
        code = end.value.code
        return Ended(code if isinstance(code, int) else 0, captured.out, captured.err)


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.fixture
def scenario(tmp_path: Path, tiny_model_dir: Path) -> Path:
    return write_scenario(tmp_path / "scenario", tiny_model_dir)


def _said(text: str) -> str:
    """Text without the line breaks of a narrow terminal."""
    return " ".join(text.split())


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def _is_one_paragraph(ended: Ended) -> bool:
    return (
        ended.err.startswith("error (")
        and "Traceback" not in ended.err
        and "\n\n" not in ended.err.strip()
    )


def test_init_writes_synthetic_hospitals_and_says_what_comes_next(
    simulate: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "new"
    ended = simulate("init", folder, "--sites", "2", "--seed", "3")
    assert ended.code == 0
    assert len(site_names(folder)) == 2
    wrote, following = ended.out.strip().splitlines()
    assert wrote == f"Wrote {folder}/run.toml, {folder}/sites, {folder}/central.jsonl"
    assert following == f"Next: consilium simulate run {folder}/run.toml"


def test_init_cuts_own_data_by_column(simulate: Command, tmp_path: Path) -> None:
    row = {"instruction": "Which test?", "output": "An echo scan."}
    rows = [{**row, "ward": ("heart", "lung")[n % 2]} for n in range(20)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    options = ("--data", tmp_path / "own.jsonl", "--partition", "column", "--column", "ward")
    ended = simulate("init", tmp_path / "new", *options)
    assert ended.code == 0
    assert site_names(tmp_path / "new") == ["heart", "lung"]


@pytest.mark.parametrize(
    "option", [("--test-share", "0.3"), ("--column", "ward"), ("--partition", "dirichlet")]
)
def test_init_says_which_options_are_for_ones_own_data(
    simulate: Command, tmp_path: Path, option: tuple[str, str]
) -> None:
    ended = simulate("init", tmp_path / "new", *option)
    assert ended.code == 2
    assert "name it with --data" in _said(ended.err)
    assert not (tmp_path / "new").exists()


def test_init_refuses_a_scenario_that_is_there(simulate: Command, scenario: Path) -> None:
    ended = simulate("init", scenario)
    assert ended.code == 2
    assert _is_one_paragraph(ended)
    assert "already holds run.toml" in _said(ended.err)


def test_run_ends_by_saying_what_it_wrote_and_where(
    simulate: Command, scenario: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = simulate("run", scenario / "run.toml", "--out", out, "--set", "train.local-steps=1")
    assert ended.code == 0, ended.err
    assert _last_line(ended.out) == (
        f"Wrote {out}: adapter/, summary.json, evaluation.json, history.jsonl, checkpoints/, report.html"
    )
    assert "Two sites trained together for 2 rounds" in (out / "report.html").read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert f"-> {summary['central']['final']['loss']:.3f}" in ended.out
    assert "Trained without differential privacy" in ended.out
    assert {row["steps"] for row in summary["privacy"].values()} == {2}


def test_a_report_that_cannot_be_drawn_does_not_spoil_the_run(
    simulate: Command, scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run_dir: Path) -> Path:
        raise OSError("no space left")

    monkeypatch.setattr("server.report.page.write_report", fail)
    ended = simulate("run", scenario / "run.toml", "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "No report was written: OSError: no space left" in ended.err
    assert _last_line(ended.out).endswith("checkpoints/")


def test_a_watched_run_says_where_and_ends_as_any_other(
    simulate: Command, scenario: Path, tmp_path: Path
) -> None:
    ended = simulate("run", scenario / "run.toml", "--out", tmp_path / "out", "--watch")
    assert ended.code == 0, ended.err
    assert "Watch it: http://127.0.0.1:" in ended.out
    assert _last_line(ended.out).endswith("report.html")


def test_private_run_states_epsilon_and_delta(
    simulate: Command, scenario: Path, tmp_path: Path
) -> None:
    private = ("--set", "privacy.unit=record", "--set", "privacy.noise-multiplier=1.0")
    ended = simulate("run", scenario / "run.toml", "--out", tmp_path / "out", *private)
    assert ended.code == 0, ended.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    worst = max(row["epsilon"] for row in summary["privacy"].values())
    assert f"Epsilon at most {worst:.2f} at delta 1e-05, at each of 2 sites" in ended.out


def test_sites_come_from_a_folder_of_jsonl_files(
    simulate: Command, scenario: Path, tmp_path: Path
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for name in site_names(scenario):
        records = scenario / "sites" / name / "records.jsonl"
        (files / f"{name}-file.jsonl").write_bytes(records.read_bytes())
    out = tmp_path / "out"
    ended = simulate("run", scenario / "run.toml", "--sites-from", files, "--out", out)
    assert ended.code == 0, ended.err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["sites"] == [f"{name}-file" for name in site_names(scenario)]


def test_unknown_keys_are_reported_together_with_exit_code_2(
    simulate: Command, scenario: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    bad = ("--set", "train.steps=3", "--set", "lora.rnk=2", "--set", "train.rounds=0")
    ended = simulate("run", scenario / "run.toml", "--out", out, *bad)
    assert ended.code == 2
    assert _is_one_paragraph(ended)
    for part in ("error (config)", "3 bad settings", "train.steps", "lora.rnk", "train.rounds = 0"):
        assert part in _said(ended.err)
    assert not out.exists()


def test_everything_wrong_with_a_scenario_is_one_paragraph_and_exit_code_2(
    simulate: Command, scenario: Path, tmp_path: Path
) -> None:
    (scenario / "central.jsonl").unlink()
    out = tmp_path / "out"
    ended = simulate("run", scenario / "run.toml", "--out", out, "--set", "federation.min-sites=3")
    assert ended.code == 2
    assert _is_one_paragraph(ended)
    assert "min-sites = 3" in _said(ended.err)
    assert "no records at" in _said(ended.err)
    assert not out.exists()


def test_too_few_usable_replies_is_exit_code_3_and_says_how_to_go_on(
    simulate: Command, scenario: Path, tmp_path: Path
) -> None:
    strict = site_names(scenario)[0]
    path = scenario / "sites" / strict / "site.toml"
    path.write_text(path.read_text() + "\n[policy]\nrequire-dp = true\n")
    ended = simulate("run", scenario / "run.toml", "--out", tmp_path / "out")
    assert ended.code == 3
    assert "error (quorum)" in ended.err
    assert "Traceback" not in ended.err
    assert f"{strict}: site-policy" in _said(ended.err)
    assert f"{strict} takes no part (site-policy)" in ended.out
    report = tmp_path / "out" / "report.html"
    assert _last_line(ended.out) == f"Wrote {report}: how far it came"
    assert "site-policy" in report.read_text()


def test_run_in_the_way_is_exit_code_4_force_and_resume_go_on(
    simulate: Command, scenario: Path, tmp_path: Path
) -> None:
    words = ("run", scenario / "run.toml", "--out", tmp_path / "out")
    assert simulate(*words).code == 0
    again = simulate(*words)
    assert again.code == 4
    assert _is_one_paragraph(again)
    assert "already holds a run" in _said(again.err)
    uid = json.loads((tmp_path / "out" / "summary.json").read_text())["run"]
    assert simulate(*words, "--resume").code == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["run"] == uid
    assert simulate(*words, "--force").code == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["run"] != uid


def test_resume_without_a_run_is_exit_code_4(
    simulate: Command, scenario: Path, tmp_path: Path
) -> None:
    ended = simulate("run", scenario / "run.toml", "--out", tmp_path / "out", "--resume")
    assert ended.code == 4
    assert not (tmp_path / "out").exists()


def test_missing_run_file_and_sites_are_said_in_words(simulate: Command, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("")
    for words in (["--sites-from", tmp_path], []):
        missing = simulate("run", tmp_path / "none.toml", *words)
        assert missing.code == 2
        assert _is_one_paragraph(missing)
        assert "no file" in missing.err
    without = simulate("run", tmp_path / "run.toml")
    assert without.code == 2
    assert "no folder" in _said(without.err)


def test_compare_prints_its_table_and_what_it_wrote(
    simulate: Command, scenario: Path, tmp_path: Path
) -> None:
    (tmp_path / "dp.toml").write_text("[privacy]\nnoise-multiplier = 1.0\n")
    words = ("compare", scenario / "run.toml", "--dp", tmp_path / "dp.toml", "--no-pooled")
    out = tmp_path / "out"
    ended = simulate(*words, "--out", out, "--set", "train.rounds=1")
    assert ended.code == 0, ended.err
    assert _last_line(ended.out) == (
        f"Wrote {out}: comparison.csv, comparison.json, runs/ (each with its adapter)"
    )
    for arm in ("untouched base", "mean of the sites alone", "federated with DP"):
        assert arm in ended.out
    with (out / "comparison.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 5


def test_help_is_there_for_every_command(simulate: Command) -> None:
    for command in ("init", "run", "compare", "attack"):
        ended = simulate(command, "--help")
        assert ended.code == 0
        assert "Usage" in ended.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--skew", "2"],
            "department_skew is 2.0; choose 0.0 to 1.0; see --sites, --skew and --seed",
        ),
        (["--sites", "99"], "num_sites is 99"),
        (["--ranks", "0,x"], "--ranks '0,x' are not ranks of 1 or more"),
    ],
)
def test_init_says_what_is_wrong_with_its_options(
    simulate: Command, tmp_path: Path, words: list[str], said: str
) -> None:
    ended = simulate("init", tmp_path / "new", *words)
    assert ended.code == 2
    assert said in _said(ended.err)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("tuned", "said"),
    [
        ("learning-rate = 3", "learning-rate stands under no method; write it under one"),
        (
            "[svdd.train]\nlearning-rate = 3",
            "nothing that is compared is called svdd; there is svd",
        ),
    ],
)
def test_compare_says_what_is_wrong_with_what_is_tuned(
    simulate: Command, scenario: Path, tmp_path: Path, tuned: str, said: str
) -> None:
    path = tmp_path / "tuned.toml"
    path.write_text(tuned)
    words = ("--methods", "svd", "--tuned", path, "--out", tmp_path / "out")
    ended = simulate("compare", scenario / "run.toml", *words)
    assert ended.code == 2
    assert said in _said(ended.err)
    assert not (tmp_path / "out").exists()


def test_a_comparison_that_is_cut_off_says_how_to_go_on(
    simulate: Command, scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, run_one = tmp_path / "out", simulations.compare.run_simulation

    def run_two(*arguments: Any, **named: Any) -> Any:
        if len(list(out.glob("runs/*/*/summary.json"))) == 2:
            raise KeyboardInterrupt
        return run_one(*arguments, **named)

    words = ("compare", scenario / "run.toml", "--methods", "svd,weighted,stack", "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(simulations.compare, "run_simulation", run_two)
        ended = simulate(*words)
    assert ended.code == 130
    assert f"2 runs are done in {out}/runs; continue with --resume" in ended.out
    assert simulate(*words, "--resume").code == 0


def test_attack_says_and_writes_what_it_found(
    simulate: Command, scenario: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    site = site_names(scenario)[1]
    ended = simulate(
        "attack", scenario / "run.toml", "--out", out, "--site", site, "--canaries", "300"
    )
    assert ended.code == 0, ended.err
    assert _last_line(ended.out) == f"Wrote {out / 'attack.json'}"
    content = json.loads((out / "attack.json").read_text())
    assert content["site"] == site
    assert content["audits"][0]["canaries"] == 300
    assert f"simulation of site {site}, run scenario, seed 0" in ended.out
    assert "not of this release's data" in _said(ended.out)


def test_attack_names_the_sites_when_there_is_no_such_one(
    simulate: Command, scenario: Path
) -> None:
    ended = simulate("attack", scenario / "run.toml", "--site", "oslo")
    assert ended.code == 2
    assert f"--site 'oslo' is none of {', '.join(site_names(scenario))}" in _said(ended.err)


def test_init_names_a_folder_as_it_is_called(simulate: Command, tmp_path: Path) -> None:
    folder = tmp_path / "study [a]"
    said = simulate("init", folder, "--sites", "2").out
    assert f"Wrote {folder}/run.toml, {folder}/sites" in said
    assert f"Next: consilium simulate run {folder}/run.toml" in said
