"""`consilium client up`: the hospital's SuperNode and superexec, for as long as it is left to run."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

from client.site_config import SITE_FILE, SiteConfig
from common.errors import ConfigError
from common.flower_process import find_command, flower_environment, free_port, http_answers
from common.supervisor import ChildSpec, Supervisor
from common.up import only_up

logger = logging.getLogger(__name__)

# As `client.supernode.CONNECTION_REFUSED`, which imports Flower: the SuperLink refuses a node that it thinks
# is connected still, for up to a minute after it died, and one that is not enrolled.
_CONNECTION_REFUSED = 305 & 0xFF
_REFUSED_WAIT_S = 15.0
_PROJECT = Path(__file__).resolve().parent.parent


def run_site(config: SiteConfig) -> None:
    """Run a hospital's side until a signal; every process has ended when this returns.

    Raises ConfigError for what is missing, EngineError when another one runs in this folder or a process
    does not stay up.
    """
    check_connection(config)
    state = config.folder / "state"
    home, state_file = state / "flower", state / "up.json"
    state.mkdir(mode=0o700, exist_ok=True)
    with only_up(
        "consilium client up",
        config.folder,
        lock=state / "up.lock",
        state_file=state_file,
        home=home,
    ) as guard:
        logger.info("site %s, coordinator %s", config.site.name, config.coordinator.address)
        Supervisor(site_processes(config, home), guard=guard, state_file=state_file).run()


def check_connection(config: SiteConfig) -> None:
    """Raise ConfigError naming everything that connecting to the coordinator still needs."""
    missing = []
    if config.coordinator.address is None:
        missing.append(
            f'address = "HOST:PORT" in [coordinator] of {SITE_FILE}, as the coordinator gives it'
        )
    if not config.root_certificates_path.is_file():
        missing.append(
            f"the coordinator's ca.crt at {config.root_certificates_path}, or its place as "
            f"root-certificates in [coordinator] of {SITE_FILE}"
        )
    if not config.node_key_path.is_file():
        missing.append(
            f"the node key (ECDSA P-384, OpenSSH form) at {config.node_key_path}, or its place as node in "
            f"[keys] of {SITE_FILE}: ssh-keygen -t ecdsa -b 384 -N '' -f {config.node_key_path}; the "
            "coordinator enrols its .pub"
        )
    if missing:
        listed = "\n".join(f"  {one}" for one in missing)
        raise ConfigError(f"{config.folder} cannot connect to its coordinator yet; add\n{listed}")


def site_processes(config: SiteConfig, home: Path) -> list[ChildSpec]:
    """Return the processes that a hospital's side consists of, in the order of their start."""
    port = free_port()
    environment = flower_environment(home)
    search = [str(_PROJECT), environment.get("PYTHONPATH", "")]
    supernode = (
        *(sys.executable, "-m", "client.supernode"),
        *("--root-certificates", str(config.root_certificates_path)),
        *("--superlink", str(config.coordinator.address)),
        *("--auth-supernode-private-key", str(config.node_key_path)),
        *("--isolation", "process", "--host", "127.0.0.1", "--port", str(port)),
        *("--node-config", f"site-dir={json.dumps(str(config.folder))}"),
    )
    superexec = (
        *(find_command(environment, "flower-superexec"), "--insecure"),
        *("--runtime-api-address", f"127.0.0.1:{port}"),
    )
    return [
        ChildSpec(
            name="supernode",
            command=supernode,
            environment={**environment, "PYTHONPATH": os.pathsep.join(filter(None, search))},
            log_file=home / "supernode.log",
            cwd=home,
            patience={_CONNECTION_REFUSED: _REFUSED_WAIT_S},
            probe=lambda: http_answers("127.0.0.1", port, tls=False),
        ),
        ChildSpec(
            name="superexec",
            command=superexec,
            environment={**environment, "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5"},
            log_file=home / "superexec.log",
            cwd=home,
        ),
    ]
