"""Tiny simulated hospitals and runs: a second for each run, after the first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from common.config import RunConfig, Scalar, load_run_config, read_toml
from server.history import Event, Listener
from simulations.run import Simulation, run_simulation
from simulations.scenario import write_synthetic_scenario
from simulations.sites import find_sites
from simulations.synthetic import SyntheticSpec

NUM_RECORDS = 12  # 4 patients with 3 records each

TINY: dict[str, Scalar] = {
    "lora.rank": 4,
    "lora.alpha": 8.0,
    "data.max-length": 48,
    "train.rounds": 2,
    "train.local-steps": 2,
    "train.batch-size": 4,
    "train.micro-batch-size": 4,
    "train.learning-rate": 1e-2,
    "privacy.unit": "none",
    "privacy.accountant": "rdp",
    "federation.min-sites": 2,
    "evaluation.batch-size": 8,
}
DP: dict[str, Scalar] = {"privacy.unit": "record", "privacy.target-epsilon": 8.0}


def write_scenario(
    folder: Path,
    model: Path,
    *,
    num_sites: int = 2,
    policies: Mapping[str, Mapping[str, Any]] | None = None,
    changes: Mapping[str, Scalar] | None = None,
) -> Path:
    """Write run.toml, central.jsonl and sites of 4 patients with 3 records each; return the folder.

    policies: site name -> what its site.toml says in [policy].
    """
    spec = SyntheticSpec(
        num_sites=num_sites,
        patients_per_site=4,
        records_per_patient=(3, 3),
        test_records=8,
    )
    config = RunConfig.parse({**TINY, "model.name": str(model), **(changes or {})})
    write_synthetic_scenario(folder, spec, config)
    for site, policy in (policies or {}).items():
        path = folder / "sites" / site / "site.toml"
        path.write_text(tomli_w.dumps({**read_toml(path), "policy": dict(policy)}))
    return folder


def site_names(scenario: Path) -> list[str]:
    return sorted(path.name for path in (scenario / "sites").iterdir())


def simulation(
    scenario: Path,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    **changes: Scalar,
) -> Simulation:
    """A run of a scenario; changes: `train__seed=1` means train.seed = 1."""
    dotted = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    return Simulation(
        config=load_run_config(scenario / "run.toml").replace(dotted),
        sources=find_sites(scenario / "sites"),
        out=out,
        base_dir=scenario,
        resume=resume,
        force=force,
    )


def run(scenario: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Run a scenario to its end and return its summary."""
    return run_simulation(simulation(scenario, out, **options))


def interrupt_after(server_round: int) -> Listener:
    """A listener that acts as Ctrl-C once a round is merged and saved."""

    def listen(event: Event) -> None:
        if event["event"] == "round" and event["round"] == server_round:
            raise KeyboardInterrupt

    return listen
