"""A comparison: its arms, what each trains with, and the table and files that it ends in."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.config import load_run_config
from common.errors import ConfigError, DataError
from server.history import Event, Listener
from simulations.arms import (
    ALONE,
    BASE,
    FEDERATED,
    FEDERATED_DP,
    METHOD,
    METHOD_DP,
    POOLED,
    Arm,
    Comparison,
    plan_arms,
)
from simulations.compare import ArmResult, mean_loss, run_comparison
from simulations.comparison_table import comparison_table, methods_table
from simulations.sites import find_sites
from tests.unit.scenarios import NUM_RECORDS, site_names, write_scenario


def _comparison(scenario: Path, out: Path, **options: Any) -> Comparison:
    return Comparison(
        config=load_run_config(scenario / "run.toml"),
        sources=tuple(find_sites(scenario / "sites")),
        out=out,
        base_dir=scenario,
        **options,
    )


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "scenario"
    return write_scenario(folder, tiny_model_dir, changes={"train.rounds": 1})


@pytest.fixture(scope="module")
def finished(
    scenario: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[ArmResult], list[tuple[str, int]]]:
    """One comparison's folder, its results, and the arms and seeds that were watched."""
    watched: list[tuple[str, int]] = []

    def watch(arm: Arm, seed: int) -> Listener:
        watched.append((arm.name, seed))
        return _ignore

    out = tmp_path_factory.mktemp("comparison") / "out"
    dp_changes = {"privacy.noise-multiplier": 1.0}
    results = run_comparison(_comparison(scenario, out, dp_changes=dp_changes), watch=watch)
    return out, results, watched


def _ignore(event: Event) -> None:
    pass


def _render(results: list[ArmResult]) -> str:
    out = io.StringIO()
    Console(file=out, width=100).print(comparison_table(results))
    return out.getvalue()


def _result(
    kind: str, name: str, seed: int, loss: float, epsilon: float | None = None
) -> ArmResult:
    return ArmResult(kind, name, seed, loss, math.exp(loss), 0.5, epsilon, 1.0)


Finished = tuple[Path, list[ArmResult], list[tuple[str, int]]]


def test_every_arm_is_run_and_measured(finished: Finished, scenario: Path) -> None:
    _, results, watched = finished
    first, second = site_names(scenario)
    trained = [f"{first} alone", f"{second} alone", FEDERATED, FEDERATED_DP, POOLED]
    assert [result.name for result in results] == [BASE, *trained]
    assert watched == [(name, 0) for name in trained]
    assert all(math.isfinite(r.loss) and r.perplexity > 1 for r in results)
    assert len({result.loss for result in results}) == 6
    epsilons = {result.name: result.epsilon for result in results}
    assert epsilons.pop(FEDERATED_DP) is not None
    assert set(epsilons.values()) == {None}


def test_csv_has_one_line_for_each_arm_and_seed(finished: Finished) -> None:
    out, results, _ = finished
    with (out / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [result.name for result in results]
    assert [float(row["loss"]) for row in rows] == [result.loss for result in results]
    assert rows[0]["epsilon"] == ""


def test_json_and_table_add_the_mean_of_the_sites_alone(finished: Finished) -> None:
    out, results, _ = finished
    content = json.loads((out / "comparison.json").read_text())
    names = [BASE, *[r.name for r in results if r.kind == ALONE]]
    names += ["mean of the sites alone", FEDERATED, FEDERATED_DP, POOLED]
    assert list(content) == names
    mean = content["mean of the sites alone"]["loss"]
    assert mean == pytest.approx(mean_loss(results, ALONE))
    assert mean == pytest.approx(sum(r.loss for r in results if r.kind == ALONE) / 2)
    table = _render(results)
    positions = [table.index(name) for name in names]
    assert positions == sorted(positions)


def test_each_arm_leaves_its_run_and_the_pooled_one_every_record(finished: Finished) -> None:
    out, results, _ = finished
    runs = {path.parent.name for path in (out / "runs" / "seed-0").glob("*/summary.json")}
    assert runs == {result.name.replace(" ", "-") for result in results[1:]}
    pooled = (out / "pooled" / "pooled.jsonl").read_text().splitlines()
    assert len(pooled) == 2 * NUM_RECORDS
    steps = {
        row["steps"]
        for path in out.glob("runs/*/*/summary.json")
        for row in json.loads(path.read_text())["privacy"].values()
    }
    assert steps == {2}, "as many steps for every model"


def test_arms_differ_in_sites_and_privacy_only(scenario: Path, tmp_path: Path) -> None:
    changes = {"train.learning-rate": 0.5}
    comparison = _comparison(scenario, tmp_path, dp_changes=changes, pooled=False)
    private = comparison.config.replace({"privacy.unit": "record", "train.rounds": 3})
    comparison = replace(comparison, config=private)
    arms = {arm.kind: arm for arm in plan_arms(comparison)}
    assert set(arms) == {ALONE, FEDERATED, FEDERATED_DP}
    configs = {kind: comparison.config.replace(arm.changes) for kind, arm in arms.items()}
    assert [c.privacy.unit for c in configs.values()] == ["none", "none", "record"]
    assert configs[ALONE].federation.min_sites == 1
    assert configs[FEDERATED].federation.min_sites == 2
    assert configs[FEDERATED].train.learning_rate == comparison.config.train.learning_rate
    assert configs[FEDERATED_DP].train.learning_rate == 0.5
    assert {c.evaluation.every for c in configs.values()} == {3}


def test_comparison_that_is_there_is_refused(finished: Finished, scenario: Path) -> None:
    out, _, _ = finished
    with pytest.raises(ConfigError, match=r"already holds a comparison; use --resume"):
        run_comparison(_comparison(scenario, out), watch=lambda arm, seed: _ignore)


def test_nothing_to_evaluate_on_is_refused_and_writes_nothing(
    scenario: Path, tmp_path: Path
) -> None:
    comparison = _comparison(scenario, tmp_path / "out")
    blind = replace(comparison, config=comparison.config.replace({"evaluation.central-data": ""}))
    with pytest.raises(ConfigError, match=r"evaluation.central-data is empty"):
        run_comparison(blind, watch=lambda arm, seed: _ignore)
    assert not (tmp_path / "out").exists()


def test_bad_data_is_said_before_anything_is_written(tiny_model_dir: Path, tmp_path: Path) -> None:
    scenario = write_scenario(tmp_path / "scenario", tiny_model_dir)
    (scenario / "sites" / site_names(scenario)[1] / "records.jsonl").write_text("")
    with pytest.raises(DataError, match="is empty"):
        run_comparison(_comparison(scenario, tmp_path / "out"), watch=lambda arm, seed: _ignore)
    assert not (tmp_path / "out").exists()


def test_table_shows_spread_and_change_over_seeds() -> None:
    results = [
        _result(kind, name, seed, loss)
        for seed, losses in enumerate([(4.0, 2.0), (4.0, 3.0)])
        for kind, name, loss in zip((BASE, FEDERATED), (BASE, FEDERATED), losses, strict=True)
    ]
    table = _render(results)
    assert "2 seeds" in table
    # 2 and 3 have mean 2.5 and sample deviation 0.707; 2.5 / 4 - 1 is -37.5 %.
    assert "2.500 ± 0.707 (-38%)" in table


def test_table_shows_the_largest_epsilon_and_fits_100_columns() -> None:
    results = [
        _result(BASE, BASE, 0, 4.0),
        _result(FEDERATED_DP, FEDERATED_DP, 0, 3.0, epsilon=7.5),
        _result(FEDERATED_DP, FEDERATED_DP, 1, 3.0, epsilon=7.875),
    ]
    table = _render(results)
    assert "7.88" in table
    assert "…" not in table


# Methods of aggregation


METHODS = ("svd", "weighted", "stack")


@pytest.fixture(scope="module")
def methods(scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    watched: list[tuple[str, int]] = []

    def watch(arm: Arm, seed: int) -> Listener:
        watched.append((arm.name, seed))
        return _ignore

    out = tmp_path_factory.mktemp("methods") / "out"
    changes = {"privacy.noise-multiplier": 1.0}
    comparison = _comparison(scenario, out, methods=METHODS, dp_changes=changes, seeds=(0, 1))
    return out, run_comparison(comparison, watch=watch), watched


def test_every_method_is_run_with_and_without_dp(methods: Finished) -> None:
    out, results, watched = methods
    names = [*METHODS, *(f"{method} with DP" for method in METHODS)]
    assert watched == [(name, seed) for seed in (0, 1) for name in names]
    assert [r.name for r in results if r.seed == 1] == [BASE, *names]
    for name in names:
        summary = json.loads(
            (out / f"runs/seed-0/{name.replace(' ', '-')}/summary.json").read_text()
        )
        assert summary["method"] == name.split()[0]
    # Without DP, the same seed is the same start and the same records: only the merge differs.
    assert len({r.loss for r in results if r.seed == 0}) == 1 + len(names)


def test_a_comparison_goes_on_where_it_was_left(
    methods: Finished, scenario: Path, tmp_path: Path
) -> None:
    out, results, _ = methods
    kept = tmp_path / "kept"
    shutil.copytree(out, kept)
    shutil.rmtree(kept / "runs" / "seed-1" / "stack")
    watched: list[tuple[str, int]] = []

    def watch(arm: Arm, seed: int) -> Listener:
        watched.append((arm.name, seed))
        return _ignore

    changes = {"privacy.noise-multiplier": 1.0}
    options = {"methods": METHODS, "dp_changes": changes, "seeds": (0, 1), "resume": True}
    again = run_comparison(_comparison(scenario, kept, **options), watch=watch)
    assert watched == [("stack", 1)]
    assert [(r.name, r.seed, r.loss) for r in again] == [(r.name, r.seed, r.loss) for r in results]
    other = {**options, "dp_changes": {"privacy.noise-multiplier": 2.0}}
    with pytest.raises(
        ConfigError, match=r"other settings \(privacy.noise-multiplier\); use --force"
    ):
        run_comparison(_comparison(scenario, kept, **other), watch=watch)


def test_a_method_that_a_setting_does_not_go_with_is_said_first(
    scenario: Path, tmp_path: Path
) -> None:
    comparison = _comparison(scenario, tmp_path / "out", methods=("svd", "weighted"))
    config = comparison.config.replace({"aggregation.server-momentum": 0.9})
    with pytest.raises(ConfigError, match="aggregation.method = 'weighted' has none"):
        run_comparison(replace(comparison, config=config), watch=lambda arm, seed: _ignore)
    assert not (tmp_path / "out").exists()


def test_methods_are_compared_seed_by_seed() -> None:
    results = [
        _result(kind, name, seed, loss, epsilon)
        for seed, losses in enumerate([(4.0, 2.0, 1.9, 3.0), (4.0, 3.0, 2.7, 3.2)])
        for kind, name, loss, epsilon in zip(
            (BASE, METHOD, METHOD, METHOD_DP),
            (BASE, "svd", "fedsvd", "svd with DP"),
            losses,
            (None, None, None, 8.0),
            strict=True,
        )
    ]
    out = io.StringIO()
    Console(file=out, width=100).print(methods_table(results))
    lines = [line for line in out.getvalue().splitlines() if "fedsvd" in line]
    # 1.9 - 2.0 and 2.7 - 3.0: mean -0.2, deviation 0.141; by itself fedsvd deviates by 0.566.
    assert "2.300 ± 0.566" in lines[0]
    assert "-0.200 ± 0.141" in lines[0]
    assert "…" not in out.getvalue()


def test_each_method_may_have_settings_of_its_own(scenario: Path, tmp_path: Path) -> None:
    tuned = {"ffa": {"train.learning-rate": 0.1}, "svd with DP": {"train.learning-rate": 0.2}}
    comparison = _comparison(
        scenario,
        tmp_path / "out",
        methods=("svd", "ffa"),
        dp_changes={"train.rounds": 2},
        tuned=tuned,
    )
    rates = {
        arm.name: comparison.config.replace(arm.changes).train.learning_rate
        for arm in plan_arms(comparison)
    }
    plain = comparison.config.train.learning_rate
    assert rates == {"svd": plain, "ffa": 0.1, "svd with DP": 0.2, "ffa with DP": plain}
    misspelt = replace(comparison, tuned={"fffa": {}})
    with pytest.raises(
        ConfigError, match="nothing that is compared is called fffa; there is svd, ffa"
    ):
        run_comparison(misspelt, watch=lambda arm, seed: _ignore)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.rounds", 9),
        ("train.local-steps", 9),
        ("train.batch-size", 9),
        ("train.seed", 9),
        ("aggregation.method", "svd"),
        ("privacy.unit", "none"),
        ("lora.rank", 9),
        ("training.learning-rate", 0.1),
    ],
)
def test_an_arm_is_not_tuned_by_more_work_another_method_or_less_privacy(
    scenario: Path, tmp_path: Path, key: str, value: int | str
) -> None:
    comparison = _comparison(
        scenario,
        tmp_path / "out",
        methods=("svd", "ffa"),
        tuned={
            "ffa": {"aggregation.server-momentum": 0.5, "train.schedule": "constant", key: value}
        },
    )
    with pytest.raises(
        ConfigError, match=rf"^{key} may not be tuned for 'ffa' alone: only keys of"
    ):
        run_comparison(comparison, watch=lambda arm, seed: _ignore)
    assert not (tmp_path / "out").exists()
