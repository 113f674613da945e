"""The node's own folder: what a second user is given, and what it is not."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import tomli_w

from client.node import init_node, load_node, node_processes, site_node
from client.site_config import load_site_config
from common.config import read_toml
from common.errors import ConfigError
from tests.unit.test_client_up import site as site  # the fixture


def test_it_holds_what_connecting_needs_and_nothing_of_the_site(site: Path, tmp_path: Path) -> None:
    config, folder = load_site_config(site), tmp_path / "node"
    written = init_node(folder, config, socket=Path("/run/consilium/agent.sock"))

    assert written == folder / "node.toml"
    assert sorted(path.name for path in folder.iterdir()) == [
        "ca.crt", "node", "node.pub", "node.toml",
    ]  # fmt: skip
    assert stat.S_IMODE((folder / "node").stat().st_mode) == 0o600
    node = load_node(folder)
    assert (node.address, node.agent) == ("localhost:8000", Path("/run/consilium/agent.sock"))
    assert node.key.read_bytes() == config.node_key_path.read_bytes()
    assert node.home == folder / "flower"


def test_without_a_socket_it_is_that_of_site_toml(site: Path, tmp_path: Path) -> None:
    init_node(tmp_path / "node", load_site_config(site))
    assert load_node(tmp_path / "node").agent == site / "state" / "agent.sock"


def test_it_may_go_to_the_coordinator_by_a_line_of_its_own(site: Path, tmp_path: Path) -> None:
    config = load_site_config(site)
    init_node(tmp_path / "node", config, address="localhost:443")
    assert load_node(tmp_path / "node").address == "localhost:443"
    assert site_node(config).address == "localhost:8000"
    with pytest.raises(ConfigError, match="--address: 'localhost' is not HOST:PORT"):
        init_node(tmp_path / "other", config, address="localhost")
    assert not (tmp_path / "other").exists()


def test_its_supernode_is_told_of_the_agent_and_of_no_folder(site: Path, tmp_path: Path) -> None:
    init_node(tmp_path / "node", load_site_config(site), socket=Path("/run/a.sock"))
    supernode, _ = node_processes(load_node(tmp_path / "node"))
    told = supernode.command[supernode.command.index("--node-config") + 1]
    assert told == f"agent={json.dumps('/run/a.sock')}"
    assert str(site) not in " ".join(supernode.command)


def test_a_site_that_has_not_joined_gives_none(site: Path, tmp_path: Path) -> None:
    (site / "coordinator" / "ca.crt").unlink()
    with pytest.raises(ConfigError, match="cannot connect to its coordinator yet"):
        init_node(tmp_path / "node", load_site_config(site))
    assert not (tmp_path / "node").exists()


def test_a_second_time_nothing_is_overwritten(site: Path, tmp_path: Path) -> None:
    config = load_site_config(site)
    init_node(tmp_path / "node", config)
    with pytest.raises(ConfigError, match="holds a node already"):
        init_node(tmp_path / "node", config)


def test_what_is_wrong_with_a_folder_is_said(site: Path, tmp_path: Path) -> None:
    folder = tmp_path / "node"
    with pytest.raises(ConfigError, match=r"no node\.toml in .*consilium client node-init"):
        load_node(folder)
    init_node(folder, load_site_config(site))
    (folder / "node").unlink()
    with pytest.raises(ConfigError, match=r"lacks .*/node; make the folder again"):
        load_node(folder)
    content = read_toml(folder / "node.toml")
    (folder / "node.toml").write_text(tomli_w.dumps({"node": {**content["node"], "records": "x"}}))
    with pytest.raises(ConfigError, match=r"node\.toml is not usable:\n.*records"):
        load_node(folder)


def test_a_sites_own_node_lies_in_its_state(site: Path) -> None:
    node = site_node(load_site_config(site))
    assert node.home == site / "state" / "flower"
    assert node.agent == site / "state" / "agent.sock"
