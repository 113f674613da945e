"""What a person orders of a coordinator's runs: begin, go on, stop."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import tomli_w

from common.audit_log import read_audit_log
from common.config import RunConfig, Scalar
from common.errors import CheckpointError, ConfigError
from common.files import write_atomically
from common.locks import LockHeldError, hold_lock, lock_holder
from server.coordinator import Coordinator
from server.flower_control import ControlError
from server.history import History
from server.keeper import read_submissions
from server.launch import Launch, read_launch, split_settings
from server.plan import PlannedRun, plan_run, told_ranks
from server.run_check import CheckedRun, Problems, check_noise, check_run
from server.run_folder import RunFolder, open_run_folder, run_lock
from server.run_state import BY_ORDER
from server.run_time import estimate_time
from server.runs import AskedRun, AskedRuns

logger = logging.getLogger(__name__)

_ORDERS_WAIT_S = 30.0
_STOP_S = 15.0
_FLOWER_TIMEOUT_S = 20.0


def check_order(coordinator: Coordinator, config: RunConfig, *, base_dir: Path) -> CheckedRun:
    """Check everything that a bad setting can break; nothing is written.

    base_dir: what relative paths in the config are relative to. Raises ConsiliumError.
    """
    problems = Problems()
    if config.model.name == "embedded":
        problems.add(
            ConfigError(
                'model.name = "embedded" is the model of simulations; name the folder of a base model '
                "that the hospitals allow"
            )
        )
        problems.raise_all()
    with problems.noting():
        roster = coordinator.roster()
        if config.federation.min_sites > len(roster):
            problems.add(
                ConfigError(
                    f"federation.min-sites = {config.federation.min_sites}, but {len(roster)} sites are "
                    "enrolled; lower it or enrol sites"
                )
            )
        if roster:
            check_noise(config, smallest_size=min(one.declared_size for one in roster.values()))
    checked = check_run(config, base_dir=base_dir, problems=problems, known={})
    problems.raise_all()
    assert checked is not None  # or problems would have said why
    return checked


def plan_order(coordinator: Coordinator, config: RunConfig, *, base_dir: Path) -> PlannedRun:
    """Return what a run would be; nothing is written. Raises as `check_order`."""
    checked = check_order(coordinator, config, base_dir=base_dir)
    log = coordinator.audit_log
    return plan_run(
        checked.config,
        roster=coordinator.roster(),
        shape=checked.prepared.shape,
        ranks=told_ranks(read_audit_log(log) if log.exists() else ()),
        time=estimate_time(
            checked.config,
            base_digest=checked.model.digest,
            runs=AskedRuns(coordinator.launches).all(),
        ),
    )


def require_room(coordinator: Coordinator, run_dir: Path, *, resume: bool) -> None:
    """Raise CheckpointError while another run goes, or a process runs the one in run_dir."""
    holder = lock_holder(run_lock(run_dir))
    if holder is not None:
        raise CheckpointError(
            f"process {holder} runs the run in {run_dir} now; watch it with `consilium server status "
            f"{coordinator.folder}`, or end it with `consilium server stop {coordinator.folder}`"
        )
    for run in AskedRuns(coordinator.launches).open():
        if resume and run.folder.path == run_dir.resolve():
            continue
        raise CheckpointError(
            f"run {run.uid} in {run.folder.path} goes ({run.state.kind}, round {run.state.rounds_done} of "
            f"{run.state.rounds or '?'}), and a coordinator runs one at a time; wait for its end, or end it "
            f"with `consilium server stop {coordinator.folder}`"
        )


def order_run(
    coordinator: Coordinator,
    checked: CheckedRun,
    *,
    run_dir: Path,
    resume: bool = False,
    force: bool = False,
) -> RunFolder:
    """Open the run's folder and ask for the run; the keeper of `consilium server up` then begins it.

    Raises CheckpointError when another run goes, or the folder does not allow it.
    """
    run_dir = run_dir.resolve()
    with _alone(coordinator):
        require_room(coordinator, run_dir, resume=resume)
        folder = open_run_folder(run_dir, checked.config, resume=resume, force=force)
        shared, private = split_settings(checked.config)
        run_config: dict[str, Scalar] = {**shared, "run.uid": folder.run_uid}
        overrides = coordinator.launches / f"{folder.run_uid}.toml"
        write_atomically(overrides, tomli_w.dumps(run_config).encode(), mode=0o600)
        _forget_earlier(coordinator, folder)
        History(folder.history).record("requested", resume=resume)
        # The launch makes it known; what it needs is there by then. The folder is open: from here on a
        # ServerApp continues what it finds there.
        Launch(
            run_dir=str(folder.path),
            key=str(coordinator.signing_key),
            roster=str(coordinator.roster_file),
            models={checked.model.name: str(checked.model.path)},
            central_files=tuple(map(str, checked.central_files)),
            settings=private,
            resume=True,
        ).save(coordinator.launches, folder.run_uid)
    return folder


def _forget_earlier(coordinator: Coordinator, folder: RunFolder) -> None:
    """A run that was replaced in its folder (--force) is not asked for any more."""
    for launch in coordinator.launches.glob("*.json"):
        with suppress(OSError, ConfigError):
            same = Path(read_launch(launch).run_dir) == folder.path
            if same and launch.stem != folder.run_uid:
                launch.unlink()
                launch.with_suffix(".toml").unlink(missing_ok=True)


def stop_run(coordinator: Coordinator) -> AskedRun:
    """End the run that goes, so that only a person's order lets it go on; return it.

    Raises ConfigError when none goes.
    """
    with _alone(coordinator):
        runs = AskedRuns(coordinator.launches)
        going = runs.open()
        if not going:
            raise ConfigError(f"no run of {coordinator.folder} goes; there is nothing to stop")
        run = going[0]
        # First of all: from now on the keeper lets it be.
        History(run.folder.history).record(
            "stopped", code=BY_ORDER, message="by order; continue with --resume"
        )
        submission = read_submissions(coordinator.keeper_state).get(run.uid)
        if submission is not None and submission.flower_run and coordinator.up_pid() is not None:
            try:
                control = coordinator.control(timeout_s=_FLOWER_TIMEOUT_S)
                control.stop(submission.flower_run)
            except ControlError as error:
                logger.warning("Flower's run %s was not stopped: %s", submission.flower_run, error)
        _end_server_app(run)
        return runs.find(run.uid) or run


def _end_server_app(run: AskedRun) -> None:
    """Wait until nothing runs a run: it ends by itself, then by SIGTERM, then by SIGKILL."""
    lock = run_lock(run.folder.path)
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        holder = lock_holder(lock)
        if holder is None:
            return
        if number is not None and holder:
            logger.warning("the ServerApp, process %d, still runs: %s", holder, number.name)
            with suppress(ProcessLookupError):
                os.kill(holder, number)
        deadline = time.monotonic() + _STOP_S
        while lock_holder(lock) is not None and time.monotonic() < deadline:
            time.sleep(0.2)


@contextmanager
def _alone(coordinator: Coordinator) -> Iterator[None]:
    """Let one order at a time through."""
    coordinator.launches.mkdir(mode=0o700, exist_ok=True)
    try:
        with hold_lock(coordinator.launches / ".lock", wait_s=_ORDERS_WAIT_S):
            yield
    except LockHeldError as error:
        raise CheckpointError(
            f"process {error.pid} is giving an order for {coordinator.folder}; try again when it is done"
        ) from None
