"""`consilium server up`: SuperLink, superexec and the keeper of runs, for as long as it is left to run."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from common.files import write_atomically
from common.flower_process import find_command, free_port, http_answers
from common.supervisor import ChildSpec, Supervisor
from common.up import only_up
from server.app_bundle import app_folder
from server.coordinator import Coordinator
from server.keeper import Keeper
from server.launch import LAUNCH_VARIABLE
from server.membership import strike_revoked
from server.report.serving_address import page_address
from server.superlink_tidy import tidy_apart

logger = logging.getLogger(__name__)

_PROJECT = Path(__file__).resolve().parent.parent
_ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def run_coordinator(coordinator: Coordinator, *, watch_port: int | None = None) -> None:
    """Run a coordinator until a signal; every process has ended when this returns.

    watch_port: of loopback, where reports are served; 0 takes a free one, None serves none: a port that
    nobody asked for is open to nobody.
    Raises EngineError when another one runs in this folder, or when a process does not stay up.
    """
    coordinator.launches.mkdir(mode=0o700, exist_ok=True)
    with only_up(
        "consilium server up",
        coordinator.folder,
        lock=coordinator.up_lock,
        state_file=coordinator.up_state,
        home=coordinator.flower_home,
    ) as guard:
        # Before anybody listens: who was revoked meanwhile is not let in for a moment.
        strike_revoked(coordinator)
        tidy_apart(coordinator.superlink_database, environment=_own_code(coordinator, guard.mark))
        control = coordinator.control(mark=guard.mark)
        control.connect(coordinator.local_address, root_certificates=coordinator.ca)
        children = coordinator_processes(coordinator)
        coordinator.watch_state.unlink(missing_ok=True)
        if watch_port is not None:
            port = watch_port or free_port()
            children.append(_reports(coordinator, port=port))
            write_atomically(coordinator.watch_state, json.dumps({"port": port}).encode())
            logger.info("reports at %s, for this user on this machine", page_address(port))
        supervisor = Supervisor(children, guard=guard, state_file=coordinator.up_state)
        keeper = Keeper(coordinator, control, app_dir=app_folder(coordinator.flower_home))
        keeper.start()
        logger.info("coordinator %s, listening on %s", coordinator.folder, coordinator.bind)
        try:
            supervisor.run(on_tick=keeper.check)
        finally:
            keeper.stop()
            coordinator.watch_state.unlink(missing_ok=True)


def _own_code(coordinator: Coordinator, mark: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process that runs this very code."""
    environment = coordinator.environment()
    search = [str(_PROJECT), environment.get("PYTHONPATH", "")]
    return {**environment, **mark, "PYTHONPATH": os.pathsep.join(filter(None, search))}


def _reports(coordinator: Coordinator, *, port: int) -> ChildSpec:
    """Return the process that serves reports: this one never holds what draws them."""
    words = ("--coordinator", str(coordinator.folder), "--port", str(port))
    return ChildSpec(
        name="reports",
        command=(sys.executable, "-m", "server.report.serving", *words),
        environment=_own_code(coordinator, {}),
        log_file=coordinator.flower_home / "reports.log",
        cwd=coordinator.flower_home,
    )


def probed_host(coordinator: Coordinator) -> str:
    """Return the host at which the SuperLink is asked whether it lives."""
    return _ANY_HOST.get(coordinator.bind.host, coordinator.bind.host)


def coordinator_processes(coordinator: Coordinator) -> list[ChildSpec]:
    """Return the processes that a coordinator consists of, in the order of their start."""
    home, bind = coordinator.flower_home, coordinator.bind
    environment = coordinator.environment()
    superlink = (
        *(sys.executable, "-m", "server.superlink", "--ssl-ca-certfile", str(coordinator.ca)),
        *("--ssl-certfile", str(coordinator.certificate)),
        *("--ssl-keyfile", str(coordinator.certificate_key)),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(coordinator.superexec_secret)),
        *("--host", bind.host, "--port", str(bind.port)),
        *("--database", str(coordinator.superlink_database)),
    )
    superexec = (
        *(find_command(environment, "flower-superexec"), "--root-certificates"),
        *(str(coordinator.ca), "--runtime-api-address", coordinator.local_address),
        *("--superexec-auth-secret-file", str(coordinator.superexec_secret)),
    )
    host = probed_host(coordinator)
    of_apps = {
        LAUNCH_VARIABLE: str(coordinator.launches),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
    }
    return [
        ChildSpec(
            name="superlink",
            command=superlink,
            environment=_own_code(coordinator, {}),
            log_file=home / "superlink.log",
            cwd=home,
            probe=lambda: http_answers(host, bind.port, tls=True),
        ),
        ChildSpec(
            name="superexec",
            command=superexec,
            environment={**environment, **of_apps},
            log_file=home / "superexec.log",
            cwd=home,
        ),
    ]
