"""A hospital folder, a coordinator's key and signed tasks, for tests of the site."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from client.site import Site
from common.adapter import AdapterState
from common.config import RunConfig, Scalar
from common.lora import initial_adapter
from common.model import choose_device, load_base
from common.model_folder import digest_model
from common.records import Envelope, Task, seal_task
from common.signing import SigningKey

SETTINGS: dict[str, Scalar] = {
    "model.name": "tiny",
    "model.quantization": "none",
    "lora.rank": 2,
    "lora.alpha": 4.0,
    "data.prompt-template": "question",
    "data.max-length": 48,
    "train.rounds": 3,
    "train.local-steps": 2,
    "train.batch-size": 4,
    "privacy.accountant": "rdp",
}


@dataclass(frozen=True)
class Hospital:
    """One site folder and everything needed to send it tasks."""

    folder: Path
    coordinator: SigningKey
    config: RunConfig
    base_digest: str
    adapter: AdapterState

    def open(self) -> Site:
        return Site.open(self.folder)

    def task(self, server_round: int = 1, **changes: Any) -> Task:
        fields: dict[str, Any] = {
            "kind": "train",
            "run_uid": "run-1",
            "site": "north",
            "server_round": server_round,
            "attempt": 1,
            # Long: a busy machine may need a minute to start an agent and train.
            "expires_at": int(time.time()) + 900,
            "base_digest": self.base_digest,
            "adapter_digest": self.adapter.digest(),
            "config": self.config.for_sites(),
        }
        settings = changes.pop("settings", {})
        fields["config"] = {**fields["config"], **settings}
        return Task(**{**fields, **changes})

    def seal(self, task: Task, key: SigningKey | None = None) -> Envelope:
        return seal_task(task, key or self.coordinator, adapter=self.adapter.to_safetensors())


def make_hospital(
    folder: Path,
    model_dir: Path,
    *,
    policy: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    num_records: int = 12,
    settings: Mapping[str, Scalar] | None = None,
) -> Hospital:
    """Write a site folder named north and return it with what a coordinator would know."""
    coordinator = SigningKey.generate()
    folder.mkdir(parents=True)
    (folder / "keys").mkdir()
    SigningKey.generate().save(folder / "keys" / "signing.pem")
    lines = [
        json.dumps({"instruction": f"What of case {i}?", "output": f"Case {i} is well."})
        for i in range(num_records)
    ]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    digest = digest_model(model_dir)
    tree = {
        "site": {"name": "north"},
        "data": {
            "name": "notes", "path": "records.jsonl", "declared-size": 12, **(data or {})
        },
        "policy": {
            "max-epsilon": 10.0,
            "allowed-models": [{"name": "tiny", "path": str(model_dir), "digest": digest}],
            **(policy or {}),
        },
        "coordinator": {"public-key": coordinator.public_hex},
        "device": {"name": "cpu"},
    }  # fmt: skip
    (folder / "site.toml").write_text(tomli_w.dumps(tree))
    config = RunConfig.parse({**SETTINGS, **(settings or {})})
    base = load_base(model_dir, config.model, device=choose_device("cpu"))
    adapter = initial_adapter(base, config.lora, seed=0)
    return Hospital(folder, coordinator, config, digest, adapter)
