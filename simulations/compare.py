"""What federation is worth: untouched base, each site alone, federated, federated with DP, pooled; or what
one way of merging is worth beside another.

Every arm is a run like any other. All ask for the same rounds, local steps and batch size; they differ in
which sites take part, in privacy, in aggregation and in how often they are evaluated. What the caller changes
comes on top: dp_changes anything at all in the arms with DP, their number of steps too; `tuned` how one arm
trains and merges, never how much. Each arm starts with fresh site folders, so that one arm's budget is no
other's.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import RunConfig, load_run_config
from common.errors import ConfigError
from common.files import write_atomically
from server.history import Listener
from simulations.arms import (
    ALONE,
    BASE,
    Arm,
    Comparison,
    changes_with_dp,
    check_tuned,
    method_arms,
    plan_arms,
)
from simulations.run import Simulation, check_simulation, run_simulation


@dataclass(frozen=True, slots=True)
class ArmResult:
    """What one arm gave for one seed; epsilon is the largest over sites, None without DP."""

    kind: str
    name: str
    seed: int
    loss: float
    perplexity: float
    token_accuracy: float
    epsilon: float | None
    wall_s: float


def run_comparison(
    comparison: Comparison, *, watch: Callable[[Arm, int], Listener]
) -> list[ArmResult]:
    """Run every arm for every seed and return the results, the untouched base first.

    watch: is told of each arm and seed, and returns the listener of its events.
    Writes runs/, comparison.csv and comparison.json into the folder.
    Raises ConfigError when the folder holds a comparison, nothing to evaluate on is given, or `tuned` names
    what it may not.
    """
    out = comparison.out
    if (out / "comparison.csv").exists() and not (comparison.force or comparison.resume):
        raise ConfigError(
            f"{out} already holds a comparison; use --resume to go on with it, --force or another folder"
        )
    if not comparison.config.evaluation.central_data:
        raise ConfigError("evaluation.central-data is empty: there is nothing to compare on")
    for changes in ({}, changes_with_dp(comparison)):
        config = comparison.config.replace(changes)
        check_simulation(Simulation(config, comparison.sources, out, base_dir=comparison.base_dir))
    arms_of_methods = list(method_arms(comparison))
    check_tuned(comparison.tuned, [arm.name for arm in arms_of_methods])
    for arm in arms_of_methods:
        # Not every method goes with every setting.
        comparison.config.replace(arm.changes)
    out.mkdir(parents=True, exist_ok=True)
    arms = plan_arms(comparison)
    results: list[ArmResult] = []
    for seed in comparison.seeds:
        for number, arm in enumerate(arms):
            summary = _run_arm(comparison, arm, seed, watch=watch)
            if number == 0:
                results.append(_result(BASE, BASE, seed, summary["central"]["base"], None, 0.0))
            epsilons = [row["epsilon"] for row in summary["privacy"].values()]
            known = [epsilon for epsilon in epsilons if epsilon is not None]
            results.append(
                _result(
                    arm.kind,
                    arm.name,
                    seed,
                    summary["central"]["final"],
                    max(known) if known else None,
                    summary["wall_s"],
                )
            )
            # After each: what is known is not lost with what is still to come.
            write_atomically(out / "comparison.csv", _csv(results).encode())
    content = json.dumps(losses_by_arm(results), indent=2)
    write_atomically(out / "comparison.json", content.encode())
    return results


def _run_arm(
    comparison: Comparison, arm: Arm, seed: int, *, watch: Callable[[Arm, int], Listener]
) -> dict[str, Any]:
    """Return an arm's summary.json, from its run now or from the one that is kept."""
    out = comparison.out / "runs" / f"seed-{seed}" / arm.name.replace(" ", "-")
    config = comparison.config.replace({**arm.changes, "train.seed": seed})
    if comparison.resume and (out / "summary.json").exists():
        _check_same_run(out, config)
        kept: dict[str, Any] = json.loads((out / "summary.json").read_text())
        return kept
    return run_simulation(
        Simulation(
            config=config,
            sources=arm.sources,
            out=out,
            base_dir=comparison.base_dir,
            force=comparison.force or comparison.resume,
        ),
        listener=watch(arm, seed),
    )


def _check_same_run(out: Path, config: RunConfig) -> None:
    """Raise ConfigError when the run that is kept had other settings."""
    # model.name: a run keeps the plain name of the folder that it was given as.
    changed = {"model.name", "run.uid"}
    before = load_run_config(out / "run.toml").flat()
    differing = [k for k, v in config.flat().items() if k not in changed and before[k] != v]
    if differing:
        raise ConfigError(
            f"{out} was run with other settings ({', '.join(differing)}); use --force to run all of it "
            "again, or another folder"
        )


def grouped(results: Sequence[ArmResult]) -> list[tuple[str, list[ArmResult]]]:
    """Return each arm's results over the seeds, by name, and those of all sites alone together."""
    names = list(dict.fromkeys(result.name for result in results))
    groups = [(name, [r for r in results if r.name == name]) for name in names]
    alone = [result for result in results if result.kind == ALONE]
    if len({result.name for result in alone}) > 1:
        position = 1 + max(i for i, (_, rows) in enumerate(groups) if rows[0].kind == ALONE)
        groups.insert(position, ("mean of the sites alone", alone))
    return groups


def mean_loss(results: Sequence[ArmResult], kind: str) -> float:
    """Return the mean loss of all arms of a kind, over all seeds."""
    return statistics.fmean(result.loss for result in results if result.kind == kind)


def _result(
    kind: str,
    name: str,
    seed: int,
    metrics: Mapping[str, float],
    epsilon: float | None,
    wall_s: float,
) -> ArmResult:
    return ArmResult(
        kind,
        name,
        seed,
        metrics["loss"],
        metrics["perplexity"],
        metrics["token_accuracy"],
        epsilon,
        wall_s,
    )


def _csv(results: Sequence[ArmResult]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(ArmResult.__slots__)
    writer.writerow(names)
    for result in results:
        writer.writerow(["" if (v := getattr(result, n)) is None else v for n in names])
    return text.getvalue()


def losses_by_arm(results: Sequence[ArmResult]) -> dict[str, Any]:
    """Return what comparison.json holds: each arm's mean loss, and that of every seed."""
    return {
        label: {
            "loss": statistics.fmean(row.loss for row in rows),
            "losses": [row.loss for row in rows],
            "wall_s": statistics.fmean(row.wall_s for row in rows),
        }
        for label, rows in grouped(results)
    }
