"""The hospital's connection: Flower's SuperNode and superexec, which hold no data and no signing key.

They may run as a user of their own, who sees nothing but a folder with

    node.toml   [node] address, root-certificates, key, agent
    node  node.pub  ca.crt          the node key, and what vouches for the coordinator
    flower/  up.json  up.lock       FLWR_HOME and logs; made by `consilium client node`
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from pydantic import ValidationError

from client.site_config import SITE_FILE, SiteConfig
from common.address import HostPort, parse_address
from common.config import read_toml
from common.errors import ConfigError
from common.files import write_atomically
from common.flower_process import find_command, flower_environment, free_port, http_answers
from common.supervisor import ChildSpec
from common.toml_section import TomlSection, bad_keys

NODE_FILE = "node.toml"

# As `client.supernode.CONNECTION_REFUSED`, which imports Flower: the SuperLink refuses a node that it thinks
# is connected still, for up to a minute after it died, and one that is not enrolled.
_CONNECTION_REFUSED = 305 & 0xFF
_REFUSED_WAIT_S = 15.0
# Flower's superexec looks for work so often; every look is a request to this machine.
_POLL_S = "0.1"
PROJECT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Node:
    """What a hospital's connection needs. address: HOST:PORT. agent: the agent's socket. home: FLWR_HOME.

    All paths are absolute.
    """

    address: str
    root_certificates: Path
    key: Path
    agent: Path
    home: Path


class _NodeSection(TomlSection):
    address: HostPort
    root_certificates: str = "ca.crt"
    key: str = "node"
    agent: str


class _NodeFile(TomlSection):
    node: _NodeSection


def site_node(config: SiteConfig) -> Node:
    """Return the connection of a site whose agent and SuperNode are one user's.

    Raises ConfigError naming everything that connecting to the coordinator still needs.
    """
    check_connection(config)
    return Node(
        address=str(config.coordinator.address),
        root_certificates=config.root_certificates_path,
        key=config.node_key_path,
        agent=config.socket_path,
        home=config.folder / "state" / "flower",
    )


def load_node(folder: Path) -> Node:
    """Return the connection that a node's folder describes. Raises ConfigError naming what is wrong."""
    path = folder / NODE_FILE
    if not path.is_file():
        raise ConfigError(
            f"no {NODE_FILE} in {folder.resolve()}; make it with `consilium client node-init {folder} --site "
            "DIR`"
        )
    try:
        section = _NodeFile.model_validate(read_toml(path)).node
    except ValidationError as error:
        raise ConfigError(f"{path} is not usable:\n{bad_keys(error)}") from None
    folder = folder.resolve()
    node = Node(
        address=section.address,
        root_certificates=folder / section.root_certificates,
        key=folder / section.key,
        agent=folder / section.agent,
        home=folder / "flower",
    )
    missing = [str(path) for path in (node.root_certificates, node.key) if not path.is_file()]
    if missing:
        raise ConfigError(f"{folder} lacks {', '.join(missing)}; make the folder again")
    return node


def init_node(
    folder: Path, config: SiteConfig, *, socket: Path | None = None, address: str = ""
) -> Path:
    """Write a node's own folder from a joined site's, and return its node.toml.

    socket: where the agent listens, as [agent] socket of site.toml says; None takes it from there. address:
    HOST:PORT that leads to the coordinator from where the node runs; "" is the coordinator's. The node key is
    copied: hand the folder to the node's user.
    Raises ConfigError when the site has not joined, the folder holds a node already, or address is none.
    """
    path = folder / NODE_FILE
    if path.exists():
        raise ConfigError(
            f"{folder} holds a node already; choose another folder, or remove {path} to write it anew"
        )
    node = site_node(config)
    try:
        leads_there = str(parse_address(address or node.address))
    except ValueError as error:
        raise ConfigError(f"--address: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    write_atomically(folder / "ca.crt", node.root_certificates.read_bytes())
    write_atomically(folder / "node", node.key.read_bytes(), mode=0o600)
    write_atomically(folder / "node.pub", node.key.with_suffix(".pub").read_bytes())
    section = {"address": leads_there, "agent": str(socket or node.agent)}
    write_atomically(path, tomli_w.dumps({"node": section}).encode())
    return path


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


def node_processes(node: Node) -> list[ChildSpec]:
    """Return the processes of a hospital's connection, in the order of their start."""
    port = free_port()
    environment = flower_environment(node.home)
    supernode = (
        *(sys.executable, "-m", "client.supernode"),
        *("--root-certificates", str(node.root_certificates)),
        *("--superlink", node.address),
        *("--auth-supernode-private-key", str(node.key)),
        *("--isolation", "process", "--host", "127.0.0.1", "--port", str(port)),
        *("--node-config", f"agent={json.dumps(str(node.agent))}"),
    )
    superexec = (
        *(find_command(environment, "flower-superexec"), "--insecure"),
        *("--runtime-api-address", f"127.0.0.1:{port}"),
    )
    return [
        ChildSpec(
            name="supernode",
            command=supernode,
            environment=with_project(environment),
            log_file=node.home / "supernode.log",
            cwd=node.home,
            patience={_CONNECTION_REFUSED: _REFUSED_WAIT_S},
            probe=lambda: http_answers("127.0.0.1", port, tls=False),
        ),
        ChildSpec(
            name="superexec",
            command=superexec,
            environment={**environment, "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": _POLL_S},
            log_file=node.home / "superexec.log",
            cwd=node.home,
        ),
    ]


def with_project(environment: dict[str, str]) -> dict[str, str]:
    """Return an environment in which `python -m` finds this project, wherever it is started."""
    search = [str(PROJECT), environment.get("PYTHONPATH", "")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, search))}
