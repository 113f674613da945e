"""A run's numbers for TensorBoard and MLflow, beside its own history: local files, and nothing phones out.

What a tracker is told stands in history.jsonl anyway. A tracker that fails is left out from then on, with one
warning; it never stops a run.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from common.config import RunConfig, Scalar
from common.errors import ConfigError
from server.history import Event, Listener

logger = logging.getLogger(__name__)

EXTRA = "tracking"
# Of each setting, the package that it needs, by the name that it is imported by.
_PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow"}
_EXPERIMENT = "consilium"
_UID_TAG = "consilium.run"
# MLflow's states of a run, by the event that ends it.
_ENDS = {"finished": "FINISHED", "stopped": "FAILED"}


class Tracker(Protocol):
    """Where numbers go. Whatever it raises is caught."""

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        """Take the numbers of one round; step 0 is the untouched base."""

    def close(self, *, ended_by: str) -> None:
        """End. ended_by: the event that ended the run, "" where none did."""


def require_trackers(config: RunConfig) -> None:
    """Raise ConfigError when a tracker is asked for whose package is not installed."""
    for name, package in _PACKAGES.items():
        if getattr(config.tracking, name) and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"tracking.{name} needs {package}, which is not installed; install it with: pip install "
                f'"consilium[{EXTRA}]", or set tracking.{name} = ""'
            )


@contextmanager
def tracked(config: RunConfig, *, run_uid: str) -> Iterator[Listener]:
    """Give a listener that tells each round's numbers to the trackers that the run asks for, if any."""
    with ExitStack() as stack:
        tellers = []
        for name, made in (("tensorboard", _TensorBoard), ("mlflow", _MLflow)):
            folder: str = getattr(config.tracking, name)
            if folder:
                teller = _Teller(name)
                teller.open(made, Path(folder), run_uid, config.flat())
                stack.callback(teller.close)
                tellers.append(teller)

        def tell(event: Event) -> None:
            for teller in tellers:
                teller.tell(event)

        yield tell


def told_numbers(event: Event) -> dict[str, float]:
    """Return what a tracker is told of an event of history.jsonl, {} for most; finite numbers only."""
    if event["event"] == "base":
        found = {f"central/{name}": event.get(name) for name in _CENTRAL}
    elif event["event"] == "round":
        metrics = event.get("metrics") or {"loss": event.get("loss")}
        spent = [row["epsilon"] for row in event.get("privacy", {}).values()]
        known = [epsilon for epsilon in spent if epsilon is not None]
        found = {
            **{f"central/{name}": metrics.get(name) for name in _CENTRAL},
            **{f"seconds/{phase}": value for phase, value in event.get("seconds", {}).items()},
            "privacy/epsilon_max": max(known) if known else None,
            "sites/merged": event.get("replies"),
            "sites/refused": len(event.get("refused", {})),
            "merge/discarded_energy": event.get("discarded_energy"),
            "bytes/up": event.get("bytes_up"),
            "bytes/down": event.get("bytes_down"),
            "train/learning_rate": event.get("learning_rate"),
            "memory/bytes": event.get("memory_bytes"),
        }
    else:
        return {}
    return {
        name: float(value)
        for name, value in found.items()
        if value is not None and math.isfinite(value)
    }


_CENTRAL = ("loss", "perplexity", "token_accuracy")


class _Making(Protocol):
    def __call__(self, folder: Path, run_uid: str, settings: Mapping[str, Scalar]) -> Tracker: ...


class _Teller:
    """One tracker, until it fails."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tracker: Tracker | None = None
        self._ended_by = ""

    def open(
        self, made: _Making, folder: Path, run_uid: str, settings: Mapping[str, Scalar]
    ) -> None:
        try:
            self._tracker = made(folder, run_uid, settings)
        except Exception as error:
            self._give_up(error)

    def tell(self, event: Event) -> None:
        if event["event"] in _ENDS:
            self._ended_by = event["event"]
        if self._tracker is None:
            return
        try:
            numbers = told_numbers(event)
            if numbers:
                self._tracker.scalars(numbers, step=int(event.get("round", 0)))
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        if self._tracker is None:
            return
        try:
            self._tracker.close(ended_by=self._ended_by)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._tracker = None
        logger.warning(
            "%s is told no more of this run, which goes on: %s: %s",
            self._name,
            type(error).__name__,
            error,
        )


class _TensorBoard:
    """Event files in FOLDER/RUN_UID, which `tensorboard --logdir FOLDER` shows."""

    def __init__(self, folder: Path, run_uid: str, settings: Mapping[str, Scalar]) -> None:
        # Only here: it takes seconds, and is not installed everywhere.
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / run_uid))
        table = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
        self._writer.add_text("run.toml", f"| setting | value |\n|---|---|\n{table}")

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, ended_by: str) -> None:
        self._writer.close()


class _MLflow:
    """A run of the experiment "consilium" in FOLDER/mlflow.db; a resumed run is gone on with."""

    def __init__(self, folder: Path, run_uid: str, settings: Mapping[str, Scalar]) -> None:
        for variable in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
            os.environ[variable] = "true"
        # Only here: it takes seconds, and is not installed everywhere.
        from mlflow import MlflowClient

        # They say each step of making their tables.
        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.WARNING)
        folder.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
        known = self._client.get_experiment_by_name(_EXPERIMENT)
        experiment = (
            known.experiment_id
            if known is not None
            else self._client.create_experiment(
                _EXPERIMENT, artifact_location=(folder / "artifacts").resolve().as_uri()
            )
        )
        found = self._client.search_runs([experiment], f"tags.`{_UID_TAG}` = '{run_uid}'")
        if found:
            self._run = found[0].info.run_id
            self._client.set_terminated(self._run, "RUNNING")
            return
        run = self._client.create_run(experiment, run_name=run_uid, tags={_UID_TAG: run_uid})
        self._run = run.info.run_id
        for key, value in settings.items():
            self._client.log_param(self._run, key, value)

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self, *, ended_by: str) -> None:
        self._client.set_terminated(self._run, _ENDS.get(ended_by, "KILLED"))
