"""One simulated run: sites, keys and roster made in the run's folder, then an engine runs it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import client.app
import client.in_process
from client.app import SITES_VARIABLE
from common.config import RunConfig
from common.errors import CheckpointError, ConfigError, EngineError
from common.model import choose_device, release_base
from common.signing import SigningKey, load_or_generate
from server import run_check
from server.app_bundle import app_folder
from server.audit import KEY_FILE, CoordinatorAudit
from server.history import Listener, read_events
from server.launch import LAUNCH_VARIABLE, Launch, split_settings
from server.run import RunPlan, run_federation
from server.run_check import BaseModelFolder, CheckedRun, Problems, check_noise, check_run
from server.run_folder import RunFolder, open_run_folder
from simulations.embedded import embedded_model_dir
from simulations.flower import FlowerEngine, run_on_flower
from simulations.inline import InlineGrid
from simulations.sites import (
    SourceSite,
    check_test_records,
    declared_size,
    plan_sites,
    write_sites,
)

EngineName = Literal["inline", "flower"]


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a simulated run starts from.

    sources: the sites. out: the run's folder. base_dir: what relative paths in the config (model.name,
    evaluation.central-data) are relative to. num_cpus: for Flower's engine.
    """

    config: RunConfig
    sources: Sequence[SourceSite]
    out: Path
    base_dir: Path
    engine: EngineName = "inline"
    resume: bool = False
    force: bool = False
    num_cpus: int = 2


def run_simulation(
    simulation: Simulation, *, listener: Listener = lambda event: None
) -> dict[str, Any]:
    """Run a simulation to its end and return its summary.json.

    listener: is told every event of history.jsonl. Everything that a bad setting can break is checked
    before anything is written. Raises ConsiliumError.
    """
    checked = check_simulation(simulation)
    config, model = checked.config, checked.model
    out = simulation.out.resolve()
    home = out / "simulation"
    key_path = home / "coordinator" / KEY_FILE
    resuming = simulation.resume and (out / "run.toml").exists()
    key = load_or_generate(key_path) if resuming else SigningKey.generate()
    plans = plan_sites(
        simulation.sources,
        model=model,
        coordinator_public_key=key.public_hex,
        config=config,
    )
    folder = open_run_folder(out, config, resume=simulation.resume, force=simulation.force)
    if not simulation.resume:
        # Budgets, keys and outboxes of an earlier run here are not this run's.
        shutil.rmtree(home, ignore_errors=True)
        key_path.parent.mkdir(parents=True, mode=0o700)
        key.save(key_path)
    roster = write_sites(plans, home / "sites")
    shared, private = split_settings(config)
    # Flower's engine starts from it, and an export later finds base model and test records by it.
    launch = Launch(
        run_dir=str(out),
        key=str(key_path),
        roster=str(home / "coordinator" / "roster.json"),
        models={model.name: str(model.path)},
        central_files=tuple(map(str, checked.central_files)),
        settings=private,
        resume=True,
    )
    if not launch.is_saved(home / "coordinator", folder.run_uid):
        launch.save(home / "coordinator", folder.run_uid)
    if simulation.engine == "inline":
        plan = RunPlan(
            config=config,
            folder=folder,
            key=key,
            roster=roster,
            prepared=checked.prepared,
            audit=CoordinatorAudit(key_path.parent, key),
            resume=simulation.resume,
        )
        return _run_inline(plan, home / "sites", listener)
    del checked
    release_base()
    roster.save(home / "coordinator" / "roster.json")
    return _run_flower(simulation, folder, home, {**shared, "run.uid": folder.run_uid}, listener)


def check_simulation(simulation: Simulation) -> CheckedRun:
    """Check everything that a bad setting or bad data can break; nothing is written.

    Raises the ConsiliumError of what is wrong, ConfigError naming it all when that is more than one.
    """
    config, sources = simulation.config, simulation.sources
    problems = Problems()
    if config.federation.min_sites > len(sources):
        problems.add(
            ConfigError(
                f"federation.min-sites = {config.federation.min_sites}, but there are "
                f"{len(sources)} sites; lower it or add sites"
            )
        )
    checked = check_run(
        config, base_dir=simulation.base_dir, problems=problems, known=_known_models()
    )
    sizes = []
    for source in sources:
        with problems.noting():
            sizes.append(declared_size(source, config=config))
    if sizes:
        with problems.noting():
            _check_training(config, smallest_size=min(sizes))
    if config.evaluation.at_sites:
        with problems.noting():
            check_test_records(sources, config=config)
    problems.raise_all()
    assert checked is not None  # or problems would have said why
    return checked


def _check_training(config: RunConfig, *, smallest_size: int) -> None:
    """What every site would refuse or fail at, said before there is a run. smallest_size: of the sites."""
    if config.train.optimizer == "paged-adamw-8bit" and choose_device().type != "cuda":
        raise ConfigError("train.optimizer = 'paged-adamw-8bit' needs CUDA; use 'adamw' here")
    check_noise(config, smallest_size=smallest_size)


def resolve_base(config: RunConfig, *, base_dir: Path) -> tuple[RunConfig, BaseModelFolder]:
    """As server/run_check.py has it; "embedded" is the model that comes with the project."""
    return run_check.resolve_base(config, base_dir=base_dir, known=_known_models())


def _known_models() -> dict[str, Path]:
    return {"embedded": embedded_model_dir()}


def _run_inline(plan: RunPlan, sites: Path, listener: Listener) -> dict[str, Any]:
    client.in_process.open_site.cache_clear()
    grid = InlineGrid(client.app.app, sorted(path for path in sites.iterdir() if path.is_dir()))
    try:
        return run_federation(grid, plan, listener=listener)
    finally:
        client.in_process.open_site.cache_clear()


def _run_flower(
    simulation: Simulation,
    folder: RunFolder,
    home: Path,
    run_config: dict[str, Any],
    listener: Listener,
) -> dict[str, Any]:
    seen = len(read_events(folder.history))

    def follow() -> None:
        nonlocal seen
        events = read_events(folder.history)
        for event in events[seen:]:
            listener(event)
        seen = len(events)

    engine = FlowerEngine(
        app_dir=app_folder(home),
        state_dir=home / "flower",
        num_sites=len(simulation.sources),
        num_cpus=simulation.num_cpus,
    )
    environment = {
        LAUNCH_VARIABLE: str(home / "coordinator"),
        SITES_VARIABLE: str(home / "sites"),
    }
    try:
        run_on_flower(engine, run_config=run_config, environment=environment, on_poll=follow)
    except EngineError as error:
        stopped = [e for e in read_events(folder.history) if e["event"] == "stopped"]
        if stopped:
            raise EngineError(
                f"the run stopped ({stopped[-1]['code']}): {stopped[-1]['message']}"
            ) from error
        raise
    if not folder.summary.exists():
        raise CheckpointError(f"Flower calls the run completed, but {folder.summary} is missing")
    summary: dict[str, Any] = json.loads(folder.summary.read_text())
    return summary
