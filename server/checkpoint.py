"""One atomic, durable checkpoint after every merge.

checkpoints/round-0003/ adapter.safetensors  state.json     (appears by a single rename)
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.adapter import AdapterShape, AdapterState, from_safetensors
from common.errors import CheckpointError, ConsiliumError
from common.files import fsync_folder, write_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state after `server_round` rounds; `progress` is what summary.json is made of."""

    server_round: int
    adapter: AdapterState
    progress: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint durably, then drop all but the newest `keep` (0 keeps all).

    Returns its folder. Raises OSError, leaving the earlier ones untouched, when the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    target = folder / f"round-{checkpoint.server_round:04d}"
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
    try:
        write_atomically(temporary / "adapter.safetensors", checkpoint.adapter.to_safetensors())
        state = {
            "round": checkpoint.server_round,
            "adapter_digest": checkpoint.adapter.digest(),
            "progress": checkpoint.progress,
        }
        write_atomically(temporary / "state.json", json.dumps(state).encode())
        if target.exists():
            shutil.rmtree(target)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_folder(folder)
    if keep:
        for old in _rounds(folder)[:-keep]:
            shutil.rmtree(old)
    return target


def load_latest(folder: Path, *, shape: AdapterShape) -> Checkpoint | None:
    """Return the newest checkpoint whose digest holds; a damaged one is passed over with a warning.

    None when there is no checkpoint. Raises CheckpointError when there are some, all damaged.
    """
    found = _rounds(folder)
    for path in reversed(found):
        try:
            state = json.loads((path / "state.json").read_text())
            adapter = from_safetensors((path / "adapter.safetensors").read_bytes(), shape=shape)
            if adapter.digest() != state["adapter_digest"]:
                raise CheckpointError(f"the adapter in {path} is not the one that was saved")
            return Checkpoint(int(state["round"]), adapter, state["progress"])
        except (OSError, ValueError, KeyError, TypeError, ConsiliumError) as error:
            logger.warning("checkpoint %s is damaged (%s); trying the one before", path, error)
    if found:
        raise CheckpointError(f"every checkpoint in {folder} is damaged; start again with --force")
    return None


def _rounds(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*")) if folder.is_dir() else []
