"""What a coordinator's command hands to the ServerApp: paths, keys and settings no site may see.

Flower passes the whole run config to every ClientApp, so these travel through the ServerApp's
environment instead: CONSILIUM_LAUNCH_DIR names a folder, in which `<run.uid>.json` is the launch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common.config import COORDINATOR_ONLY, RunConfig, Scalar
from common.errors import ConfigError
from common.files import write_atomically

LAUNCH_VARIABLE = "CONSILIUM_LAUNCH_DIR"

# The app bundle: the folder whose pyproject.toml describes it.
APP_DIR = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Launch:
    """Paths are absolute: a ServerApp's working folder is Flower's, not the user's.

    run_dir: where the run writes. key: the task-signing key (PEM), in the coordinator's
    folder, where its audit log is too. roster: roster.json.
    models: model.name -> folder. central_files: records for central evaluation.
    settings: the coordinator-only keys of RUN.toml. resume: continue what run_dir holds.
    """

    run_dir: str
    key: str
    roster: str
    models: Mapping[str, str] = field(default_factory=dict)
    central_files: tuple[str, ...] = ()
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    resume: bool = False

    def is_saved(self, folder: Path, run_uid: str) -> bool:
        """Whether this very launch of a run is in a folder already."""
        try:
            return read_launch(folder / f"{run_uid}.json") == self
        except ConfigError:
            return False

    def save(self, folder: Path, run_uid: str) -> Path:
        """Write the launch of a run, mode 0600, and return its path."""
        path = folder / f"{run_uid}.json"
        write_atomically(path, json.dumps(asdict(self), indent=2).encode(), mode=0o600)
        return path


def read_launch(path: Path) -> Launch:
    """Return a saved launch. Raises ConfigError when it is malformed or gone."""
    try:
        content = json.loads(path.read_text())
        return Launch(**{**content, "central_files": tuple(content["central_files"])})
    except (OSError, ValueError, TypeError, KeyError):
        raise ConfigError(f"{path} is not a launch; write it again") from None


def load_launch(run_config: Mapping[str, Scalar]) -> tuple[Launch, RunConfig]:
    """Return the launch that the environment names for this run, and the run's whole config.

    Raises ConfigError when there is none or it is malformed.
    """
    folder = os.environ.get(LAUNCH_VARIABLE, "")
    run_uid = str(run_config.get("run.uid", ""))
    path = Path(folder) / f"{run_uid}.json"
    if not folder or not run_uid or not path.is_file():
        raise ConfigError(
            f"no launch for run.uid = {run_uid!r} in {LAUNCH_VARIABLE} = {folder!r}; set run.uid and "
            "start the ServerApp's environment with that variable"
        )
    launch = read_launch(path)
    return launch, RunConfig.parse({**run_config, **launch.settings})


def split_settings(config: RunConfig) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
    """Return (what may go into Flower's run config, what only the coordinator needs)."""
    shared: dict[str, Scalar] = {}
    private: dict[str, Scalar] = {}
    for key, value in config.flat().items():
        (private if key.startswith(COORDINATOR_ONLY) else shared)[key] = value
    return shared, private
