"""The folder that a run writes, and who may write into it.

RUN_DIR/ run.toml  history.jsonl  checkpoints/round-0003/  adapter/  summary.json  evaluation.json
report.html and, while a round goes, incoming/; attack.json where somebody made it
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from common.config import RunConfig, flatten, read_toml
from common.errors import CheckpointError, ConfigError
from common.files import write_atomically
from common.locks import LockHeldError, hold_lock
from server.exclusions import EXCLUSIONS_FILE

_OWN = (
    "run.toml",
    "history.jsonl",
    "checkpoints",
    "incoming",
    "adapter",
    "summary.json",
    "evaluation.json",
    "report.html",
    "attack.json",
    "export",
    EXCLUSIONS_FILE,
)
# What tells a run from settings alone.
_TRACES = ("history.jsonl", "summary.json", "checkpoints")
_LOCK_FILE = ".lock"
# May differ between a run and its resumption.
# All that a site is sent stays: a changed task would be a new one, trained and charged again.
_MAY_CHANGE = ("federation.", "evaluation.", "checkpoint.", "export.", "tracking.")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run. `run_uid` is made once and kept on resume."""

    path: Path
    run_uid: str

    @property
    def history(self) -> Path:
        """One line for each event."""
        return self.path / "history.jsonl"

    @property
    def checkpoints(self) -> Path:
        """One folder for each kept round."""
        return self.path / "checkpoints"

    @property
    def incoming(self) -> Path:
        """The updates of the round that goes, until they are merged."""
        return self.path / "incoming"

    @property
    def adapter(self) -> Path:
        """The exported PEFT folder."""
        return self.path / "adapter"

    @property
    def summary(self) -> Path:
        """The run in numbers."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """The page that shows it all."""
        return self.path / "report.html"

    @property
    def evaluation(self) -> Path:
        """What was measured of the result, beside its base."""
        return self.path / "evaluation.json"

    @property
    def exclusions(self) -> Path:
        """The sites that the coordinator has shut out."""
        return self.path / EXCLUSIONS_FILE

    @contextmanager
    def held(self) -> Iterator[None]:
        """Be the only process that runs this run. Raises CheckpointError while another one does."""
        try:
            with hold_lock(run_lock(self.path)):
                yield
        except LockHeldError as error:
            raise CheckpointError(
                f"process {error.pid} runs the run in {self.path}; wait for its end, or stop it, and "
                "begin again"
            ) from None

    def write_summary(self, content: dict[str, Any]) -> None:
        """Write summary.json atomically."""
        write_atomically(self.summary, (json.dumps(content, indent=2) + "\n").encode())


def run_lock(path: Path) -> Path:
    """Return the file whose lock a process holds for as long as it runs the run in a folder."""
    return path / _LOCK_FILE


def holds_run(path: Path) -> bool:
    """Return whether a run has begun in a folder.

    A run writes its uid into run.toml; the run.toml of a scenario or a comparison has none. One that
    cannot be read may be a run's.
    """
    run_file = path / "run.toml"
    if not run_file.is_file():
        return False
    if any((path / name).exists() for name in _TRACES):
        return True
    try:
        return bool(flatten(read_toml(run_file)).get("run.uid"))
    except ConfigError:
        return True


def open_run_folder(
    path: Path, config: RunConfig, *, resume: bool = False, force: bool = False
) -> RunFolder:
    """Return the folder of a new run, or of one to resume.

    force: throw an earlier run in it away (its own files only).
    Raises CheckpointError when it holds a run and neither is given, when there is nothing to resume,
    when the settings to resume with are not those that the run began with, when it holds a run.toml
    that no run wrote, or when it cannot be made.
    """
    run_file = path / "run.toml"
    if resume:
        if not run_file.exists():
            raise CheckpointError(f"{path} holds no run to resume; start one without --resume")
        saved = flatten(read_toml(run_file))
        run_uid = str(saved.get("run.uid", ""))
        before, now = RunConfig.parse(saved).flat(), config.flat()
        changed = [
            key
            for key in now
            if now[key] != before[key] and key != "run.uid" and not key.startswith(_MAY_CHANGE)
        ]
        if changed:
            raise CheckpointError(
                f"{path} was begun with other settings: {', '.join(changed)}; "
                "resume with the same ones, or start a new run in another folder"
            )
        return RunFolder(path, run_uid)
    if run_file.exists() and not holds_run(path):
        raise CheckpointError(
            f"{path} holds a run.toml that no run wrote, and a run there would replace it; choose another "
            "folder"
        )
    if any((path / name).exists() for name in _OWN):
        if not force:
            raise CheckpointError(
                f"{path} already holds a run; continue it with --resume, replace it with --force, "
                "or choose another folder"
            )
        if (path / "release").exists():
            raise CheckpointError(
                f"{path} holds a release of the run that --force would replace; move {path / 'release'} "
                "away first, or choose another folder"
            )
        for name in _OWN:
            target = path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be made a folder ({error.strerror}); choose another one"
        ) from None
    run_uid = config.run.uid or uuid.uuid4().hex
    write_atomically(run_file, run_toml({**config.flat(), "run.uid": run_uid}).encode())
    return RunFolder(path, run_uid)


def run_toml(flat: dict[str, Any]) -> str:
    """Return dotted keys as a RUN.toml with tables."""
    tree: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    return tomli_w.dumps(tree)
