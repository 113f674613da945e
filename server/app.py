"""The ServerApp: wire and start."""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import ConsiliumError
from common.signing import SigningKey
from server.history import History
from server.launch import load_launch
from server.roster import Roster
from server.run import RunPlan, run_federation
from server.run_folder import open_run_folder

logger = logging.getLogger(__name__)
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that this run's launch describes."""
    launch, config = load_launch(context.run_config)
    folder = open_run_folder(Path(launch.run_dir), config, resume=launch.resume)
    plan = RunPlan(
        config=config,
        folder=folder,
        key=SigningKey.load(Path(launch.key)),
        roster=Roster.load(Path(launch.roster)),
        models={name: Path(path) for name, path in launch.models.items()},
        central_files=[Path(path) for path in launch.central_files],
        resume=launch.resume,
    )
    try:
        run_federation(grid, plan)
    except ConsiliumError as error:
        History(folder.history).record("stopped", code=error.code, message=str(error))
        raise
