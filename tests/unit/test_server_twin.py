"""The twin of a run: what is taken from the run's folder, and that the simulation is found by its name."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import server.cli_attack
import simulations.attack.twin
from common.config import RunConfig
from common.errors import CheckpointError, ConfigError, ModelError, SignatureError
from server.cli import app
from server.history import History
from server.run_folder import run_toml
from server.twin import TwinOrder, find_audit, order_twin
from simulations.attack.attack import Effort
from simulations.attack.twin import audit_twin
from tests.unit.scenarios import run, write_scenario

ROW = {"unit": "record", "epsilon": 5.96, "delta": 1e-5, "noise_multiplier": 0.8}
ENTRY = EntryPoint("twin", "simulations.attack.twin:audit_twin", "consilium.audits")


def _write_run(
    folder: Path, rows: Mapping[str, Mapping[str, Any]], *, unit: str = "record"
) -> Path:
    folder.mkdir()
    config = RunConfig().replace({"privacy.unit": unit, "train.batch-size": 32})
    (folder / "run.toml").write_text(run_toml({**config.flat(), "run.uid": "abc"}))
    (folder / "summary.json").write_text(json.dumps({"run": "abc", "privacy": rows}))
    History(folder / "history.jsonl").record("run-started", run="abc", rounds=5, base="f" * 64)
    return folder


def test_a_twin_has_the_sites_noise_rate_and_rounds(tmp_path: Path) -> None:
    """32 records at rate 0.032 are of 1,000; 60 steps of 20 a round are 3 rounds of the 5 planned."""
    north = {**ROW, "sample_rate": 0.032, "steps": 60}
    south = {**ROW, "sample_rate": 0.064, "steps": 100}
    folder = _write_run(tmp_path / "run", {"south": south, "north": north})
    order = order_twin(folder)
    assert (order.run, order.site, order.declared_size, order.rounds) == ("abc", "north", 1000, 3)
    assert order.config.privacy.noise_multiplier == 0.8
    assert order.base_digest == "f" * 64
    assert order_twin(folder, site="south").declared_size == 500


def test_a_run_that_does_not_tell_its_size_is_told_it(tmp_path: Path) -> None:
    plain = {**ROW, "epsilon": None, "unit": "none", "sample_rate": 1.0, "steps": 100}
    folder = _write_run(tmp_path / "run", {"north": plain}, unit="none")
    assert order_twin(folder).declared_size == 4000
    assert order_twin(folder, size=70).declared_size == 70


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run; give the folder"):
        order_twin(tmp_path)
    folder = _write_run(tmp_path / "run", {})
    (folder / "summary.json").rename(folder / "kept")
    with pytest.raises(CheckpointError, match="has not finished; let it go on with --resume"):
        order_twin(folder)
    (folder / "kept").rename(folder / "summary.json")
    with pytest.raises(ConfigError, match="no site replied"):
        order_twin(folder)
    folder = _write_run(tmp_path / "other", {"north": {**ROW, "sample_rate": 0.5, "steps": 20}})
    with pytest.raises(ConfigError, match="'oslo' took no part in this run; that did: north"):
        order_twin(folder, site="oslo")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"run": "abc"}', '{"run": "abc", "privacy": {"north": {}}}']
)
def test_a_damaged_summary_is_told_in_words(tmp_path: Path, content: str) -> None:
    folder = _write_run(tmp_path / "run", {})
    (folder / "summary.json").write_text(content)
    with pytest.raises(ConfigError, match="summary.json or .* is not of the form that a run write"):
        order_twin(folder)


def test_the_simulation_is_found_by_its_entry_point_or_missed_in_words() -> None:
    assert find_audit([ENTRY]) is audit_twin
    pyproject = tomllib.loads((Path(server.__file__).parents[1] / "pyproject.toml").read_text())
    assert pyproject["project"]["entry-points"]["consilium.audits"] == {"twin": ENTRY.value}
    with pytest.raises(ConfigError, match="no simulation is installed that makes a twin"):
        find_audit([])


def _order(**changes: Any) -> TwinOrder:
    return replace(
        TwinOrder(run="abc", config=RunConfig(), site="north", declared_size=9, rounds=1, seed=2),
        **changes,
    )


def test_another_base_model_is_refused_and_a_missing_one_named(tiny_model_dir: Path) -> None:
    with pytest.raises(SignatureError, match="expected ffffffffffffffff"):
        audit_twin(_order(model=tiny_model_dir, base_digest="f" * 64))
    unknown = RunConfig().replace({"model.name": "/no/such/model"})
    with pytest.raises(ModelError, match="--model names the base model's folder"):
        audit_twin(_order(config=unknown))


@pytest.mark.parametrize("unit", ["record", "patient"])
def test_made_up_records_are_of_the_declared_size(unit: str) -> None:
    config = RunConfig().replace({"privacy.unit": unit})
    records = simulations.attack.twin._made_up(_order(config=config, declared_size=50))
    assert (len(records) if unit == "record" else len(records.patients)) == 50


def test_the_command_audits_a_real_runs_twin_and_writes_attack_json(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Effort(gradient_canaries=9999, record_canaries=20, people=2, prompts=4, samples=2)
    monkeypatch.setattr(simulations.attack.twin, "Effort", lambda: small)
    monkeypatch.setattr(server.cli_attack, "find_audit", lambda: find_audit([ENTRY]))
    monkeypatch.setenv("COLUMNS", "100")
    scenario = write_scenario(tmp_path / "scenario", tiny_model_dir)
    summary = run(scenario, tmp_path / "run", privacy__unit="record", privacy__target_epsilon=8.0)

    ended = CliRunner().invoke(
        app,
        [
            "audit", str(tmp_path / "run"), "--model", str(tiny_model_dir), "--seed", "3",
            "--canaries", "500",
        ],
        catch_exceptions=False,
    )  # fmt: skip

    assert ended.exit_code == 0
    assert ended.stdout.rstrip().endswith(f"Wrote {tmp_path / 'run' / 'attack.json'}")
    assert "simulated twin of site" in ended.stdout
    content = json.loads((tmp_path / "run" / "attack.json").read_text())
    assert content["audits"][0]["canaries"] == 500
    assert (content["kind"], content["run"]) == ("simulated twin", summary["run"])
    row = summary["privacy"][content["site"]]
    ledger = content["ledger"]
    assert math.isclose(ledger["epsilon"], row["epsilon"], rel_tol=1e-6)
    for name in ("unit", "delta", "noise_multiplier", "sample_rate", "steps"):
        assert ledger[name] == row[name]
    for one in content["audits"]:
        assert one["epsilon_lower"] <= row["epsilon"]
