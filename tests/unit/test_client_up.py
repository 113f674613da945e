"""`consilium client up`: what it needs, what it starts, and that it is alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli_w
from typer.testing import CliRunner

from client.cli import app
from client.node import check_connection, node_processes, site_node
from client.site_config import SiteConfig, load_site_config
from client.up import agent_process, run_site
from common.config import read_toml
from common.errors import ConfigError, EngineError
from common.locks import hold_lock
from tests.integration.certificates import write_node_key


def write_site(folder: Path) -> Path:
    """A hospital's folder as it is before anybody thinks of connecting."""
    folder.mkdir()
    settings = {
        "site": {"name": "north"},
        "data": {"name": "notes", "path": "records.jsonl", "declared-size": 100},
        "policy": {"max-epsilon": 8.0, "allowed-models": []},
        "coordinator": {"public-key": "ab" * 32},
    }
    (folder / "site.toml").write_text(tomli_w.dumps(settings))
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A hospital that can connect."""
    folder = write_site(tmp_path / "site")
    _set(folder, address="localhost:8000")
    (folder / "keys").mkdir(exist_ok=True)
    write_node_key(folder / "keys", "node")
    (folder / "coordinator").mkdir()
    (folder / "coordinator" / "ca.crt").write_text("a certificate")
    return folder


def _set(folder: Path, **coordinator: str) -> None:
    content = read_toml(folder / "site.toml")
    content["coordinator"].update({k.replace("_", "-"): v for k, v in coordinator.items()})
    (folder / "site.toml").write_text(tomli_w.dumps(content))


def _config(folder: Path) -> SiteConfig:
    return load_site_config(folder)


def test_a_site_that_can_connect_has_nothing_to_add(site: Path) -> None:
    check_connection(_config(site))


def test_everything_that_is_missing_is_named_with_what_to_add(tmp_path: Path) -> None:
    folder = write_site(tmp_path / "site")
    with pytest.raises(ConfigError, match="cannot connect to its coordinator yet") as caught:
        check_connection(_config(folder))
    said = str(caught.value)
    assert 'address = "HOST:PORT" in [coordinator] of site.toml' in said
    assert str(folder / "coordinator" / "ca.crt") in said
    assert f"ssh-keygen -t ecdsa -b 384 -N '' -f {folder / 'keys' / 'node'}" in said
    assert CliRunner().invoke(app, ["up", "--site", str(folder)]).exception is not None
    assert not (folder / "state" / "flower").exists()


@pytest.mark.parametrize("address", ["consilium.example.org", ":8000", "host:0", "::1:8000"])
def test_an_address_without_host_or_port_is_refused(site: Path, address: str) -> None:
    _set(site, address=address)
    with pytest.raises(ConfigError, match=r"coordinator\.address.*is not HOST:PORT"):
        _config(site)


def test_the_places_of_certificate_and_key_are_the_sites_to_choose(site: Path) -> None:
    (site / "coordinator" / "ca.crt").rename(site / "other.crt")
    _set(site, root_certificates="other.crt")
    check_connection(_config(site))


def test_the_supernode_is_told_where_the_agent_is_and_the_relay_gets_no_key(site: Path) -> None:
    supernode, superexec = node_processes(site_node(_config(site)))
    command = supernode.command
    assert command[1:3] == ("-m", "client.supernode")
    told = command[command.index("--node-config") + 1]
    assert told == f"agent={json.dumps(str(site / 'state' / 'agent.sock'))}"
    assert command[command.index("--superlink") + 1] == "localhost:8000"
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert "process" in command
    port = command[command.index("--port") + 1]
    assert superexec.command[-1] == f"127.0.0.1:{port}"
    for process in (supernode, superexec):
        assert process.environment["FLWR_HOME"] == str(site / "state" / "flower")
        assert process.environment["FLWR_TELEMETRY_ENABLED"] == "0"
        assert process.environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert supernode.patience == {49: 15.0}


def test_the_agent_is_started_for_this_folder_and_given_time_to_load_a_model(site: Path) -> None:
    config = _config(site)
    agent = agent_process(config, site_node(config))
    assert agent.command[1:] == ("-m", "common.cli", "client", "agent", "--site", str(site))
    assert agent.hung_s == 300.0


def test_a_second_one_is_refused(site: Path) -> None:
    (site / "state").mkdir(exist_ok=True)
    with (
        hold_lock(site / "state" / "up.lock"),
        pytest.raises(EngineError, match=r"is `consilium client up` for .*kill \d+"),
    ):
        run_site(_config(site))
