"""The ServerApp: wire and start."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.signing import SigningKey
from server.audit import CoordinatorAudit
from server.launch import load_launch
from server.prepared_run import prepare_run
from server.roster import Roster
from server.run import RunPlan, run_federation
from server.run_folder import open_run_folder

# Each may hold one adapter in memory.
_PULL_THREADS = 4

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that this run's launch describes."""
    launch, config = load_launch(context.run_config)
    prepared = prepare_run(
        config,
        models={name: Path(path) for name, path in launch.models.items()},
        central_files=[Path(path) for path in launch.central_files],
    )
    key_path = Path(launch.key)
    key = SigningKey.load(key_path)
    plan = RunPlan(
        config=config,
        folder=open_run_folder(Path(launch.run_dir), config, resume=launch.resume),
        key=key,
        roster=Roster.load(Path(launch.roster)),
        roster_file=Path(launch.roster),
        prepared=prepared,
        audit=CoordinatorAudit(key_path.parent, key),
        resume=launch.resume,
        pull_threads=_PULL_THREADS,
    )
    run_federation(grid, plan)
