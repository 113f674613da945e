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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import RunConfig, Scalar, load_run_config
from common.errors import ConfigError
from common.files import write_atomically
from server.history import Listener
from simulations.run import Simulation, check_simulation, run_simulation
from simulations.sites import SourceSite, site_records

ALONE, FEDERATED, FEDERATED_DP, POOLED, BASE = (
    "alone",
    "federated",
    "federated with DP",
    "pooled",
    "untouched base",
)
# Arms named by their method of aggregation.
METHOD, METHOD_DP = "method", "method with DP"

# An arm with more work, other draws or another method than its name says would be compared with nothing.
_NOT_TUNED = (
    "train.rounds", "train.local-steps", "train.batch-size", "train.seed", "aggregation.method",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Arm:
    """One run of a comparison: its kind, which sites take part, what differs from RUN.toml."""

    kind: str
    name: str
    sources: tuple[SourceSite, ...]
    changes: Mapping[str, Scalar]


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


@dataclass(frozen=True, slots=True)
class Comparison:
    """What to compare. dp_changes: what else differs from RUN.toml in the arm with DP.

    pooled: whether to train on all records in one place, which no hospital would allow.
    methods: aggregation methods to compare in place of all that; with DP too where RUN.toml or dp_changes
    ask for it. tuned: arm's name -> what else differs from RUN.toml in it, of [train] and [aggregation] but
    for how much is trained, seed and method: methods that train one factor want another learning rate than
    those that train two. resume: keep the arms that are done, and go on.
    """

    config: RunConfig
    sources: tuple[SourceSite, ...]
    out: Path
    base_dir: Path
    seeds: tuple[int, ...] = (0,)
    dp_changes: Mapping[str, Scalar] | None = None
    pooled: bool = True
    methods: tuple[str, ...] = ()
    tuned: Mapping[str, Mapping[str, Scalar]] = field(default_factory=dict)
    force: bool = False
    resume: bool = False


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
    for changes in ({}, _dp_changes(comparison)):
        config = comparison.config.replace(changes)
        check_simulation(Simulation(config, comparison.sources, out, base_dir=comparison.base_dir))
    arms_of_methods = list(_method_arms(comparison))
    _check_tuned(comparison.tuned, [arm.name for arm in arms_of_methods])
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


def _check_tuned(tuned: Mapping[str, Mapping[str, Scalar]], names: Sequence[str]) -> None:
    unknown = tuned.keys() - set(names)
    if unknown:
        raise ConfigError(
            f"nothing that is compared is called {', '.join(sorted(unknown))}; there is "
            f"{', '.join(names) or 'no method'}"
        )
    for name, changes in tuned.items():
        for key in changes:
            if key in _NOT_TUNED or not key.startswith(("train.", "aggregation.")):
                raise ConfigError(
                    f"{key} may not be tuned for {name!r} alone: only keys of [train] and [aggregation] "
                    f"other than {', '.join(_NOT_TUNED)} may; set it for all in RUN.toml"
                )


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


def plan_arms(comparison: Comparison) -> list[Arm]:
    """Return the arms of a comparison, in the order in which they run."""
    if comparison.methods:
        return list(_method_arms(comparison))
    everyone, count = comparison.sources, len(comparison.sources)
    last_only = {"evaluation.every": comparison.config.train.rounds}
    without_dp: dict[str, Scalar] = {**last_only, "privacy.unit": "none"}
    one_site: dict[str, Scalar] = {
        **without_dp,
        "federation.min-sites": 1,
        "federation.quorum": 0,
        "federation.fraction": 1.0,
    }
    all_sites = {"federation.min-sites": count}
    arms = [Arm(ALONE, f"{source.name} alone", (source,), one_site) for source in everyone]
    arms.append(Arm(FEDERATED, FEDERATED, everyone, {**without_dp, **all_sites}))
    dp = {**all_sites, **_dp_changes(comparison)}
    arms.append(Arm(FEDERATED_DP, FEDERATED_DP, everyone, dp))
    if comparison.pooled:
        unprotected = comparison.config.replace({"privacy.unit": "none"})
        pooled = _pool(everyone, comparison.out / "pooled", config=unprotected)
        arms.append(Arm(POOLED, POOLED, (pooled,), one_site))
    return arms


def _method_arms(comparison: Comparison) -> Iterator[Arm]:
    everyone, config = comparison.sources, comparison.config
    all_sites = {"federation.min-sites": len(everyone)}
    for method in comparison.methods:
        changes: dict[str, Scalar] = {
            **all_sites,
            "privacy.unit": "none",
            "evaluation.every": config.train.rounds,
            "aggregation.method": method,
            **comparison.tuned.get(method, {}),
        }
        yield Arm(METHOD, method, everyone, changes)
    if not (config.use_dp or comparison.dp_changes):
        return
    for method in comparison.methods:
        name = f"{method} with DP"
        dp = {**all_sites, **_dp_changes(comparison), "aggregation.method": method}
        yield Arm(METHOD_DP, name, everyone, {**dp, **comparison.tuned.get(name, {})})


def _dp_changes(comparison: Comparison) -> dict[str, Scalar]:
    """What the arm with DP changes in RUN.toml, whatever the sites."""
    unit = comparison.config.privacy.unit
    changes = comparison.dp_changes or {}
    rounds = changes.get("train.rounds", comparison.config.train.rounds)
    return {
        "privacy.unit": "record" if unit == "none" else unit,
        **changes,
        "evaluation.every": rounds,
    }


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


def _pool(sources: Sequence[SourceSite], folder: Path, *, config: RunConfig) -> SourceSite:
    """Write every site's usable records into one JSONL file, the pooled arm's only site."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for source in sources:
        for prompt in site_records(source, config=config).prompts:
            row = {
                "instruction": prompt.instruction,
                "input": prompt.input,
                "output": prompt.output,
            }
            lines.append(json.dumps(row))
    path = folder / "pooled.jsonl"
    write_atomically(path, ("\n".join(lines) + "\n").encode())
    return SourceSite("pooled", path.resolve())
