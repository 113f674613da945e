"""A run that has finished, read back from its folder for whoever hands its result on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from common.adapter import AdapterState, LoraPair, adapter_shape_of, tensor_names
from common.config import RunConfig, flatten, read_toml
from common.errors import CheckpointError, ConfigError, ConsiliumError, ModelError
from common.locks import lock_holder
from common.model_folder import check_digest, check_model_folder
from server.checkpoint import load_round
from server.history import Event, read_events
from server.launch import Launch, read_launch
from server.run_folder import RunFolder, holds_run, run_lock
from server.run_state import run_state

_A_ENDING = ".lora_A.weight"


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """What a run left behind.

    config: as run.toml has it; model.name is a plain name. base_digest: of the base model that it ran on.
    adapter: the run's product, scaling 1. adapter_digest: of the same adapter as the rounds had it, which the
    audit log names; where its checkpoint is gone, of `adapter` itself. launch: where the base model and the
    central records were, None where no launch is found.
    """

    folder: RunFolder
    config: RunConfig
    summary: Mapping[str, Any]
    base_digest: str
    adapter: AdapterState
    adapter_digest: str
    launch: Launch | None

    @property
    def exported_round(self) -> int:
        """The round whose adapter is the run's product."""
        return int(self.summary["exported_round"])

    @property
    def simulated(self) -> bool:
        """Whether one machine imitated its hospitals; their own folders then lie in the run's."""
        return (self.folder.path / "simulation").is_dir()

    @property
    def base_name(self) -> str:
        """The base model's name without a place on this machine; "org/name" of the hub stays."""
        name = self.config.model.name
        is_place = name.startswith(("/", ".", "~")) or name.count("/") > 1
        return Path(name).name if is_place else name

    @property
    def central_files(self) -> tuple[Path, ...]:
        """The run's central test records that are still where they were."""
        found = self.launch.central_files if self.launch else ()
        return tuple(path for path in map(Path, found) if path.is_file())


def load_finished_run(path: Path) -> FinishedRun:
    """Return the finished run in a folder.

    Raises ConfigError when it holds no run, CheckpointError when the run has not finished or its adapter is
    not the one that was saved.
    """
    if not holds_run(path):
        raise ConfigError(f"{path} holds no run; give the folder that the run wrote, with run.toml")
    saved = flatten(read_toml(path / "run.toml"))
    folder, config = RunFolder(path, str(saved.get("run.uid", ""))), RunConfig.parse(saved)
    held = lock_holder(run_lock(path)) is not None
    try:
        events = read_events(folder.history)
        state = run_state(events, held=held)
        begun = [str(event["base"]) for event in events if event["event"] == "run-started"]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder.history} is damaged ({type(error).__name__}), and says what became of the run; restore "
            "it from a backup"
        ) from None
    if state.kind != "finished":
        raise CheckpointError(
            f"the run in {path} has not finished ({state.kind}, round {state.rounds_done} of "
            f"{state.rounds or '?'}); let it go on with --resume and come back when it is done"
        )
    summary = _read_summary(folder.summary)
    if not begun:
        raise CheckpointError(f"{folder.history} does not say what the run began with; restore it")
    adapter = read_exported_adapter(folder.adapter)
    _check_as_finished(adapter, folder, events)
    return FinishedRun(
        folder=folder,
        config=config,
        summary=summary,
        base_digest=begun[-1],
        adapter=adapter,
        adapter_digest=_check_adapter(adapter, folder, config, int(summary["exported_round"])),
        launch=_find_launch(folder),
    )


def read_exported_adapter(folder: Path) -> AdapterState:
    """Return the adapter in a PEFT folder of ours, whose scaling is 1.

    Raises CheckpointError when it is missing, malformed, or holds NaN or infinity.
    """
    path = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
        pairs = {}
        for name in sorted(name for name in tensors if name.endswith(_A_ENDING)):
            module = name.removeprefix("base_model.model.").removesuffix(_A_ENDING)
            a, b = (tensors.pop(tensor) for tensor in tensor_names(module))
            pairs[module] = LoraPair(a.astype(np.float32), b.astype(np.float32))
        state = AdapterState(pairs, 1.0)
    except (OSError, SafetensorError, KeyError, ValueError, ConsiliumError) as error:
        raise CheckpointError(
            f"{path} is not an adapter that a run wrote ({type(error).__name__}); restore it, or run again"
        ) from None
    if tensors or not state.is_finite():
        what = f"tensors that are no LoRA factors: {min(tensors)}" if tensors else "NaN or infinity"
        raise CheckpointError(f"{path} holds {what}; restore it, or run again")
    return state


def find_base(run: FinishedRun, *, given: Path | None = None) -> Path:
    """Return the folder of a run's base model, which is proven to be that model.

    given: where a person says that it is. Raises ModelError when it is not found, SignatureError when the
    folder holds another model.
    """
    name = run.config.model.name
    known = run.launch.models.get(name) if run.launch else None
    folder = (given or Path(known or name)).resolve()
    if not folder.is_dir():
        raise ModelError(
            f"the run's base model {name!r} is not at {folder}; say where it is: --model FOLDER"
        )
    check_model_folder(folder)
    check_digest(folder, run.base_digest)
    return folder


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        int(summary["exported_round"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise CheckpointError(
            f"{path} is missing or damaged, and says what the run came to; restore it, or run again"
        ) from None
    return summary


def _check_as_finished(adapter: AdapterState, folder: RunFolder, events: Sequence[Event]) -> None:
    """Raise CheckpointError when a run's product is not the one that its history ends with.

    A history of an earlier version does not say which that was.
    """
    finished = [event for event in events if event["event"] == "finished"]
    digest = str(finished[-1].get("adapter", "")) if finished else ""
    if digest and digest != adapter.digest():
        raise CheckpointError(
            f"{folder.adapter} is not what this run finished with: {folder.history} has digest "
            f"{digest[:16]}..., and this is {adapter.digest()[:16]}...; it was changed since: restore it, or "
            "run again"
        )


def _check_adapter(
    adapter: AdapterState, folder: RunFolder, config: RunConfig, server_round: int
) -> str:
    """Return the digest of a run's product as its round had it. Raises CheckpointError when it is another."""
    if not (folder.checkpoints / f"round-{server_round:04d}").is_dir():
        return adapter.digest()
    sides = {name: (pair.B.shape[0], pair.A.shape[1]) for name, pair in adapter.pairs.items()}
    shape = adapter_shape_of(sides, rank=config.lora.rank, lora=config.lora)
    kept = load_round(folder.checkpoints, server_round, shape=shape).adapter
    if kept.unscaled().digest() != adapter.digest():
        raise CheckpointError(
            f"{folder.adapter} is not the adapter of round {server_round}, which is in "
            f"{folder.checkpoints}; it was changed since: restore it, or run again"
        )
    return kept.digest()


def _find_launch(folder: RunFolder) -> Launch | None:
    """A simulation's launch is in its own folder, a coordinator's beside its runs."""
    path = folder.path.resolve()
    for place in (path / "simulation" / "coordinator", path.parent.parent / "launches"):
        launch = place / f"{folder.run_uid}.json"
        if folder.run_uid and launch.is_file():
            return read_launch(launch)
    return None
