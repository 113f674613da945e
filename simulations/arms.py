"""The arms of a comparison: which sites take part in each, and what it changes in RUN.toml."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.config import RunConfig, Scalar
from common.errors import ConfigError
from common.files import write_atomically
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


def plan_arms(comparison: Comparison) -> list[Arm]:
    """Return the arms of a comparison, in the order in which they run."""
    if comparison.methods:
        return list(method_arms(comparison))
    everyone, count = comparison.sources, len(comparison.sources)
    last_only = {"evaluation.every": comparison.config.train.rounds}
    without_dp: dict[str, Scalar] = {**last_only, "privacy.unit": "none"}
    one_site: dict[str, Scalar] = {
        **without_dp,
        "federation.min-sites": 1,
        "federation.quorum": 0,
        "federation.fraction": 1.0,
        # Nobody reads what a site's own model answers; each costs seconds.
        "evaluation.num-questions": 0,
    }
    all_sites = {"federation.min-sites": count}
    arms = [Arm(ALONE, f"{source.name} alone", (source,), one_site) for source in everyone]
    arms.append(Arm(FEDERATED, FEDERATED, everyone, {**without_dp, **all_sites}))
    dp = {**all_sites, **changes_with_dp(comparison)}
    arms.append(Arm(FEDERATED_DP, FEDERATED_DP, everyone, dp))
    if comparison.pooled:
        unprotected = comparison.config.replace({"privacy.unit": "none"})
        pooled = _pool(everyone, comparison.out / "pooled", config=unprotected)
        arms.append(Arm(POOLED, POOLED, (pooled,), one_site))
    return arms


def method_arms(comparison: Comparison) -> Iterator[Arm]:
    """Yield an arm for each method, without DP and, where it is asked for, with it."""
    everyone, config = comparison.sources, comparison.config
    all_sites = {"federation.min-sites": len(everyone)}
    for method in comparison.methods:
        changes: dict[str, Scalar] = {
            **all_sites,
            "privacy.unit": "none",
            "evaluation.every": config.train.rounds,
            "evaluation.num-questions": 0,
            "aggregation.method": method,
            **comparison.tuned.get(method, {}),
        }
        yield Arm(METHOD, method, everyone, changes)
    if not (config.use_dp or comparison.dp_changes):
        return
    for method in comparison.methods:
        name = f"{method} with DP"
        dp = {**all_sites, **changes_with_dp(comparison), "aggregation.method": method}
        yield Arm(METHOD_DP, name, everyone, {**dp, **comparison.tuned.get(name, {})})


def changes_with_dp(comparison: Comparison) -> dict[str, Scalar]:
    """Return what the arm with DP changes in RUN.toml, whatever the sites."""
    unit = comparison.config.privacy.unit
    changes = comparison.dp_changes or {}
    rounds = changes.get("train.rounds", comparison.config.train.rounds)
    return {
        "privacy.unit": "record" if unit == "none" else unit,
        **changes,
        "evaluation.every": rounds,
    }


def check_tuned(tuned: Mapping[str, Mapping[str, Scalar]], names: Sequence[str]) -> None:
    """Raise ConfigError when `tuned` names no arm, or a key that says how much is trained."""
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
