"""`consilium client up`: the hospital's agent and its connection, for as long as they are left to run."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from client.agent_control import agent_answers
from client.node import Node, load_node, node_processes, site_node, with_project
from client.site_config import SiteConfig
from common.flower_process import flower_environment
from common.supervisor import ChildSpec, Supervisor
from common.up import only_up

logger = logging.getLogger(__name__)

# Loading a large model leaves it no time to answer.
_AGENT_HUNG_S = 300.0


def run_site(config: SiteConfig) -> None:
    """Run a hospital's side until a signal; every process has ended when this returns.

    Raises ConfigError for what is missing, EngineError when another one runs in this folder or a process
    does not stay up.
    """
    node, state = site_node(config), config.folder / "state"
    state.mkdir(mode=0o700, exist_ok=True)
    with only_up(
        "consilium client up",
        config.folder,
        lock=state / "up.lock",
        state_file=state / "up.json",
        home=node.home,
    ) as guard:
        logger.info("site %s, coordinator %s", config.site.name, node.address)
        children = [agent_process(config, node), *node_processes(node)]
        Supervisor(children, guard=guard, state_file=state / "up.json").run()


def run_node(folder: Path) -> None:
    """Run a hospital's connection alone until a signal. Raises as `run_site` does."""
    node, folder = load_node(folder), folder.resolve()
    with only_up(
        "consilium client node",
        folder,
        lock=folder / "up.lock",
        state_file=folder / "up.json",
        home=node.home,
    ) as guard:
        logger.info("coordinator %s, agent %s", node.address, node.agent)
        Supervisor(node_processes(node), guard=guard, state_file=folder / "up.json").run()


def agent_process(config: SiteConfig, node: Node) -> ChildSpec:
    """Return the process that holds the hospital's data, model and keys."""
    return ChildSpec(
        name="agent",
        command=(
            *(sys.executable, "-m", "common.cli", "client", "agent"),
            *("--site", str(config.folder)),
        ),
        environment=with_project(flower_environment(node.home)),
        log_file=node.home / "agent.log",
        cwd=node.home,
        # Not the relay's socket, whose handlers others can keep busy.
        probe=lambda: agent_answers(config.control_socket_path),
        hung_s=_AGENT_HUNG_S,
    )
