"""Two small hospitals, a coordinator and a run, on disk, for tests with real Flower processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.config import RunConfig, Scalar
from common.signing import SigningKey, load_or_generate
from server.launch import Launch, split_settings
from server.roster import Roster
from simulations.run import resolve_base
from simulations.sites import find_sites, plan_sites, write_sites
from simulations.synthetic import SyntheticSpec, generate_hospitals, write_jsonl

SMALL: dict[str, Scalar] = {
    "model.quantization": "nf4",
    "lora.rank": 4,
    "data.max-length": 128,
    "train.rounds": 2,
    "train.local-steps": 2,
    "train.batch-size": 4,
    "train.micro-batch-size": 4,
    "train.optimizer": "sgd",
    "train.learning-rate": 0.1,
    "privacy.unit": "none",
    "federation.min-sites": 2,
    "federation.deadline-s": 240.0,
    "evaluation.batch-size": 8,
}


def write_data(folder: Path, *, num_sites: int = 2) -> Path:
    """Write sites/*.jsonl and central.jsonl; return the folder."""
    hospitals = generate_hospitals(
        SyntheticSpec(num_sites=num_sites, patients_per_site=8, test_records=16, seed=3)
    )
    for name, records in hospitals.sites.items():
        write_jsonl(records, folder / "sites" / f"{name}.jsonl")
    write_jsonl(hospitals.central_test, folder / "central.jsonl")
    return folder


@dataclass(frozen=True)
class Lab:
    """A coordinator and its enrolled sites, each with a folder of its own."""

    folder: Path
    config: RunConfig
    roster: Roster
    model_path: Path
    key: SigningKey

    @property
    def sites(self) -> Path:
        return self.folder / "hospitals"

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def launch_dir(self) -> Path:
        return self.folder / "coordinator"

    def launch(self, run_uid: str, *, resume: bool = False) -> dict[str, Scalar]:
        """Save the launch of a run and return the run config to submit."""
        shared, private = split_settings(self.config)
        Launch(
            run_dir=str(self.run_dir),
            key=str(self.launch_dir / "signing.pem"),
            roster=str(self.launch_dir / "roster.json"),
            models={self.config.model.name: str(self.model_path)},
            central_files=(str(self.folder / "central.jsonl"),),
            settings=private,
            resume=resume,
        ).save(self.launch_dir, run_uid)
        return {**shared, "run.uid": run_uid}


def make_lab(folder: Path, changes: dict[str, Scalar] | None = None, *, num_sites: int = 2) -> Lab:
    """Write data, keys, site folders and roster of some hospitals."""
    write_data(folder, num_sites=num_sites)
    config, model = resolve_base(RunConfig.parse({**SMALL, **(changes or {})}), base_dir=folder)
    key = load_or_generate(folder / "coordinator" / "signing.pem")
    plans = plan_sites(
        find_sites(folder / "sites"),
        model=model,
        coordinator_public_key=key.public_hex,
        config=config,
    )
    roster = write_sites(plans, folder / "hospitals")
    roster.save(folder / "coordinator" / "roster.json")
    return Lab(folder, config, roster, model.path, key)
