"""A coordinator and hospitals made by the commands that people give, from nothing."""

from __future__ import annotations

from pathlib import Path

import tomli_w
import tomlkit

from common.config import Scalar
from common.model_folder import digest_model
from simulations.embedded import embedded_model_dir
from simulations.synthetic import SyntheticSpec, generate_hospitals, write_jsonl
from tests.integration.commands import Commands, Federation
from tests.integration.sites import SMALL
from tests.ports import free_port


def plan_federation(folder: Path, changes: dict[str, Scalar] | None = None) -> Federation:
    """Write RUN.toml and records for two hospitals; nobody has a folder yet."""
    hospitals = generate_hospitals(
        SyntheticSpec(num_sites=2, patients_per_site=8, test_records=8, seed=3)
    )
    federation = Federation(
        folder, folder / "coordinator", folder, free_port(), tuple(sorted(hospitals.sites))
    )
    run = {**SMALL, "model.name": str(embedded_model_dir()), "train.rounds": 1, **(changes or {})}
    federation.run_file.write_text(tomli_w.dumps(run))
    for name, records in hospitals.sites.items():
        (folder / "records").mkdir(exist_ok=True)
        write_jsonl(records, folder / "records" / f"{name}.jsonl")
    return federation


def must(commands: Commands, *words: str | Path) -> str:
    """Run `consilium WORDS`, which must succeed, and return what it said."""
    code, output = commands.run(*map(str, words), timeout_s=240)
    assert code == 0, output + commands.tails()
    return output


def make_and_enrol(commands: Commands, name: str) -> None:
    """Make a hospital's folder, enrol it, and let it join."""
    federation = commands.federation
    site, bundle = federation.site(name), federation.folder / f"bundle-{name}.json"
    must(commands, "client", "init", site, "--name", name, "--declared-size", "20")
    records = federation.folder / "records" / f"{name}.jsonl"
    (site / "records.jsonl").write_bytes(records.read_bytes())
    allow(site, embedded_model_dir())
    enrolment = site / "enrolment.json"
    must(commands, "server", "enroll", enrolment, federation.coordinator, "--out", bundle, "--yes")
    must(commands, "client", "join", bundle, "--site", site, "--yes")


def allow(site: Path, model: Path) -> None:
    """What a hospital's people write into site.toml."""
    path = site / "site.toml"
    document = tomlkit.parse(path.read_text())
    document["policy"].update(
        {
            "approval": "auto",
            "require-dp": False,
            "max-epsilon": float("inf"),
            "allowed-models": [
                {"name": model.name, "path": str(model), "digest": digest_model(model)}
            ],
        }
    )
    path.write_text(tomlkit.dumps(document))
