"""One atomic, durable checkpoint after every merge.

checkpoints/round-0003/ adapter.safetensors  state.json  SHA256SUMS     (appears by a single rename)
                        velocity.safetensors                            (with server momentum)

SHA256SUMS is in the form that `sha256sum --check` reads: a damaged checkpoint is found by it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.adapter import AdapterShape, AdapterState, from_safetensors
from common.errors import CheckpointError, ConsiliumError
from common.files import fsync_folder, write_atomically

logger = logging.getLogger(__name__)

_ADAPTER, _STATE, _SUMS = "adapter.safetensors", "state.json", "SHA256SUMS"
_VELOCITY = "velocity.safetensors"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state of a run after `server_round` rounds, and the whole of it.

    progress: what summary.json is made of, history and privacy report of all rounds among it. The round
    is the schedule's position too: optimizer state does not cross rounds, and selection and learning rate
    follow from round and seed. roster: digest of the roster that the round was run with. velocity: of the
    server's momentum, None without it.
    """

    server_round: int
    adapter: AdapterState
    progress: dict[str, Any]
    run_uid: str = ""
    roster: str = ""
    velocity: AdapterState | None = None


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, *, keep: int, best: int | None = None
) -> Path:
    """Write a checkpoint durably, then drop all but the newest `keep` (0 keeps all) and round `best`.

    Returns its folder. Raises OSError, leaving the earlier ones untouched, when the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    target = _round_folder(folder, checkpoint.server_round)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
    try:
        state = {
            "round": checkpoint.server_round,
            "run": checkpoint.run_uid,
            "roster": checkpoint.roster,
            "adapter_digest": checkpoint.adapter.digest(),
            "rank": checkpoint.adapter.rank,
            "progress": checkpoint.progress,
        }
        contents = {
            _ADAPTER: checkpoint.adapter.to_safetensors(),
            _STATE: json.dumps(state).encode(),
        }
        if checkpoint.velocity is not None:
            contents[_VELOCITY] = checkpoint.velocity.to_safetensors()
        for name, content in contents.items():
            write_atomically(temporary / name, content)
        sums = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in contents.items()]
        write_atomically(temporary / _SUMS, "".join(sums).encode())
        if target.exists():
            # A round is done again only where what it left was damaged.
            os.rename(target, folder / f".replaced-{temporary.name}")
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_folder(folder)
    _sweep(folder)
    if keep:
        for old in _rounds(folder)[:-keep]:
            if best is None or old != _round_folder(folder, best):
                shutil.rmtree(old)
    return target


def load_latest(folder: Path, *, shape: AdapterShape) -> Checkpoint | None:
    """Return the newest checkpoint whose digests hold; a damaged one is passed over with a warning.

    None when there is no checkpoint. Raises CheckpointError when there are some, all damaged.
    """
    found = _rounds(folder)
    for path in reversed(found):
        try:
            return _load(path, shape=shape)
        except (OSError, ValueError, KeyError, TypeError, ConsiliumError) as error:
            logger.warning("checkpoint %s is damaged (%s); trying the one before", path, error)
    if found:
        raise CheckpointError(f"every checkpoint in {folder} is damaged; start again with --force")
    return None


def load_round(folder: Path, server_round: int, *, shape: AdapterShape) -> Checkpoint:
    """Return the checkpoint of one round. Raises CheckpointError when it is missing or damaged."""
    path = _round_folder(folder, server_round)
    try:
        return _load(path, shape=shape)
    except (OSError, ValueError, KeyError, TypeError, ConsiliumError) as error:
        raise CheckpointError(f"checkpoint {path} is missing or damaged ({error})") from None


def _load(path: Path, *, shape: AdapterShape) -> Checkpoint:
    sums = dict(line.split("  ")[::-1] for line in (path / _SUMS).read_text().splitlines())
    contents = {name: (path / name).read_bytes() for name in {_ADAPTER, _STATE, *sums}}
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != sums[name]:
            raise CheckpointError(f"{name} is not what was saved")
    state = json.loads(contents[_STATE])
    # Some methods let the adapter grow; its scaling stays that of lora.rank. Earlier versions say no rank.
    grown = replace(shape, rank=int(state.get("rank", shape.rank)))
    adapter = from_safetensors(contents[_ADAPTER], shape=grown)
    if adapter.digest() != state["adapter_digest"]:
        raise CheckpointError("the adapter is not the one that was saved")
    velocity = contents.get(_VELOCITY)
    return Checkpoint(
        int(state["round"]),
        adapter,
        state["progress"],
        state["run"],
        state["roster"],
        None if velocity is None else from_safetensors(velocity, shape=shape),
    )


def _sweep(folder: Path) -> None:
    """Remove what a killed process left half-written, and what was replaced."""
    for pattern in (".writing-*", ".replaced-*"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def _round_folder(folder: Path, server_round: int) -> Path:
    return folder / f"round-{server_round:04d}"


def _rounds(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*")) if folder.is_dir() else []
