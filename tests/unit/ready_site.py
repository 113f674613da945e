"""A hospital's folder as `client init` and `join` make it, filled in as its people would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tomlkit

from client.provisioning import init_site, join
from client.site_config import SiteConfig, load_site_config
from common.enrolment import Bundle
from common.model_folder import digest_model
from common.signing import SigningKey
from server.certificates import make_authority

NUM_PATIENTS = 20


def make_ready_site(folder: Path, model_dir: Path, *, address: str = "127.0.0.1:1") -> SiteConfig:
    """Write a site named north: 40 records of 20 patients, the model "tiny", on the CPU."""
    made = init_site(folder, name="north", declared_size=20, unit="patient", patient_id="who")
    authority = make_authority("Coordinator CA").certificate.decode()
    coordinator = SigningKey.generate().public_hex
    join(folder, Bundle("north", address, authority, coordinator, made.signing_key))
    lines = [
        json.dumps({"instruction": f"What of {i}?", "output": "Well.", "who": i % NUM_PATIENTS})
        for i in range(2 * NUM_PATIENTS)
    ]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    model = {"name": "tiny", "path": str(model_dir), "digest": digest_model(model_dir)}
    return edited(folder, policy={"allowed-models": [model]}, device={"name": "cpu"})


def edited(folder: Path, **sections: dict[str, Any]) -> SiteConfig:
    """Change keys of site.toml, and read it again."""
    path = folder / "site.toml"
    document = tomlkit.parse(path.read_text())
    for section, values in sections.items():
        document.setdefault(section, tomlkit.table()).update(values)
    path.write_text(tomlkit.dumps(document))
    return load_site_config(folder)
