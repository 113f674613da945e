"""What the simulated twin of a run is made from, and where the simulation is that makes one.

The coordinator has no records. A twin is a site of made-up or public records that trains as the run's sites
did; the simulation is found by entry point, since nothing here may import it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from common.config import RunConfig, load_run_config
from common.errors import CheckpointError, ConfigError
from server.history import read_events
from server.run_folder import RunFolder, holds_run

GROUP = "consilium.audits"
_TWIN = "twin"


@dataclass(frozen=True, slots=True)
class TwinOrder:
    """One site of a run to be imitated and attacked.

    config: the run's, with the noise that the site trained with. rounds: those that it trained in.
    base_digest: of the run's base model, "" when the run did not say. model: its folder, None where
    model.name tells it. data: public records, None for made-up ones. canaries: in gradients, at most; None
    for as many as are usual. on_progress: stage, done, of how many.
    """

    run: str
    config: RunConfig
    site: str
    declared_size: int
    rounds: int
    base_digest: str = ""
    model: Path | None = None
    data: Path | None = None
    canaries: int | None = None
    seed: int = 0
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None


AuditTwin = Callable[[TwinOrder], dict[str, Any]]


def find_audit(installed: Iterable[EntryPoint] | None = None) -> AuditTwin:
    """Return what audits a twin and gives the content of attack.json.

    installed: the entry points to look among; those of the environment when None.
    Raises ConfigError when there is none.
    """
    found = entry_points(group=GROUP) if installed is None else installed
    entry = next((entry for entry in found if entry.name == _TWIN), None)
    if entry is None:
        raise ConfigError(
            f"no simulation is installed that makes a twin (entry point {_TWIN!r} of {GROUP}); install "
            "consilium with its simulations, as `pip install consilium` does"
        )
    audit: AuditTwin = entry.load()
    return audit


def order_twin(run_dir: Path, *, site: str = "", size: int = 0) -> TwinOrder:
    """Return the order for the twin of a finished run's site, from its run.toml, summary and history.

    site: the one of the largest declared size when "". size: its records, where the run does not tell: a run
    without protection, or one whose batch is as large as the site.
    Raises ConfigError when the folder holds no run, or no such site, or its summary is damaged;
    CheckpointError when the run has not finished.
    """
    folder = RunFolder(run_dir, "")
    if not holds_run(run_dir):
        raise ConfigError(
            f"{run_dir} holds no run; give the folder that the run wrote, with run.toml"
        )
    if not folder.summary.is_file():
        raise CheckpointError(
            f"the run in {run_dir} has not finished; let it go on with --resume and come back when it is done"
        )
    try:
        return _order(folder, site=site, size=size)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder.summary} or {folder.history} is not of the form that a run writes "
            f"({type(error).__name__}); restore it from a backup"
        ) from None


def _order(folder: RunFolder, *, site: str, size: int) -> TwinOrder:
    summary = json.loads(folder.summary.read_text(encoding="utf-8"))
    rows: dict[str, dict[str, Any]] = summary["privacy"]
    if not rows:
        raise ConfigError(
            f"{folder.path}: no site replied in this run; there is nothing to imitate"
        )
    site = site or min(rows, key=lambda name: (rows[name]["sample_rate"], name))
    if site not in rows:
        raise ConfigError(f"--site {site!r} took no part in this run; that did: {', '.join(rows)}")
    row = rows[site]
    config = load_run_config(folder.path / "run.toml")
    order = TwinOrder(
        run=summary["run"],
        config=config,
        site=site,
        declared_size=size or _TYPICAL_SIZE,
        rounds=max(1, row["steps"] // config.train.local_steps),
        base_digest=_base_digest(folder),
    )
    if row["epsilon"] is None:
        return order
    told = round(config.train.batch_size / row["sample_rate"]) if row["sample_rate"] < 1 else 0
    noise = {"privacy.noise-multiplier": row["noise_multiplier"]}
    return replace(
        order,
        config=config.replace(noise),
        declared_size=told or size or config.train.batch_size,
    )


# Enough that half of them are two thousand members, and the other half as many others.
_TYPICAL_SIZE = 4000


def _base_digest(folder: RunFolder) -> str:
    events = read_events(folder.history) if folder.history.is_file() else []
    return next((str(e["base"]) for e in events if e["event"] == "run-started"), "")
