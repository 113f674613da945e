"""The folder of a finished run, made without running one: any model, any adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.adapter import AdapterState, LoraPair
from common.config import RunConfig, Scalar
from common.lora import initial_adapter
from common.model import choose_device, load_base
from common.model_folder import digest_model
from server.checkpoint import Checkpoint, save_checkpoint
from server.export.adapter import export_adapter
from server.history import History
from server.launch import Launch
from server.run_folder import RunFolder, open_run_folder

UID = "f" * 32
PROTECTED = {
    "unit": "record",
    "epsilon": 7.5,
    "delta": 1e-5,
    "noise_multiplier": 0.8,
    "sample_rate": 0.1,
    "steps": 40,
}


def trained_adapter(base: Path, config: RunConfig, *, size: float = 0.3) -> AdapterState:
    """Return PEFT's initial A on a model folder, and a B that is not zero: the same every time."""
    loaded = load_base(base, config.model, device=choose_device())
    start = initial_adapter(loaded, config.lora, seed=0)
    random = np.random.default_rng(0)
    return AdapterState(
        {
            name: LoraPair(pair.A, (size * random.standard_normal(pair.B.shape)).astype(np.float32))
            for name, pair in start.pairs.items()
        },
        start.scaling,
        start.own_scalings,
    )


def finished_config(**changes: Scalar) -> RunConfig:
    """Return a small run's settings; changes: `lora__rank=4` means lora.rank = 4."""
    dotted = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    return RunConfig.parse(
        {"model.name": "tiny", "lora.rank": 4, "data.max-length": 48, "run.uid": UID, **dotted}
    )


def write_finished_run(
    path: Path,
    base: Path,
    config: RunConfig,
    *,
    adapter: AdapterState | None = None,
    central_files: tuple[Path, ...] = (),
    privacy: dict[str, Any] | None = None,
    central: dict[str, Any] | None = None,
) -> RunFolder:
    """Write what a run of two sites and one round leaves behind."""
    adapter = adapter or trained_adapter(base, config)
    folder = open_run_folder(path, config)
    protected = {name: {**PROTECTED, "epsilon": 7.5 - i} for i, name in enumerate(("bern", "oslo"))}
    summary = {
        "run": folder.run_uid,
        "rounds_planned": 1,
        "method": config.aggregation.method,
        "sites": ["bern", "oslo"],
        "central": central or {"base": {}, "final": {}},
        "best": None,
        "exported_round": 1,
        "rounds": [{"round": 1, "loss": None, "sites": ["bern", "oslo"]}],
        "privacy": protected if privacy is None else privacy,
    }
    history = History(folder.history)
    history.record("run-started", run=folder.run_uid, rounds=1, base=digest_model(base))
    save_checkpoint(folder.checkpoints, Checkpoint(1, adapter, summary, folder.run_uid), keep=3)
    history.record("round", **summary["rounds"][0], privacy=summary["privacy"])
    export_adapter(adapter, folder.adapter, lora=config.lora, base_name=config.model.name)
    folder.write_summary(summary)
    history.record("finished", folder=str(path), adapter=adapter.unscaled().digest())
    home = path / "simulation" / "coordinator"
    home.mkdir(parents=True)
    Launch(
        run_dir=str(path),
        key=str(home / "signing.pem"),
        roster=str(home / "roster.json"),
        models={config.model.name: str(base)},
        central_files=tuple(map(str, central_files)),
    ).save(home, folder.run_uid)
    return folder
