"""What the compose files promise. No Docker engine runs them here; they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
import yaml  # type: ignore[import-untyped]  # ships no types

from client.cli import app

DOCKER = Path(__file__).parents[2] / "deploy" / "docker"


def _services(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DOCKER / f"compose.{name}.yml").read_text())
    services: dict[str, Any] = content["services"]
    return services


def _mounted(service: dict[str, Any]) -> set[str]:
    """What a service mounts, by the name before the colon."""
    return {volume.rpartition(":/")[0] for volume in service["volumes"]}


@pytest.mark.parametrize("name", ["coordinator", "hospital"])
def test_every_service_is_confined(name: str) -> None:
    for service in _services(name).values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service


def test_agent_and_node_share_the_socket_and_nothing_else() -> None:
    services = _services("hospital")
    agent, node, line = services["agent"], services["node"], services["line"]
    assert agent["user"].split(":")[0] != node["user"].split(":")[0]
    assert _mounted(agent) & _mounted(node) == {"socket"}
    assert "socket:/run/consilium:ro" in node["volumes"]
    assert "volumes" not in line


def test_the_agent_has_no_network_and_the_node_one_that_ends_at_the_line() -> None:
    content = yaml.safe_load((DOCKER / "compose.hospital.yml").read_text())
    services, networks = content["services"], content["networks"]
    assert services["agent"]["network_mode"] == "none"
    assert services["node"]["networks"] == ["inside"]
    assert networks["inside"] == {"internal": True}
    assert set(services["line"]["networks"]) == {"inside", "outside"}


def test_what_the_services_start_is_a_command_with_their_folder() -> None:
    commands = typer.main.get_group(app).commands
    services = _services("hospital")
    for name in ("agent", "node"):
        group, command, *arguments = services[name]["command"]
        assert group == "client"
        folder = arguments[-1]
        # Parsed, not run: an option or a command that is no more ends the test.
        commands[command].make_context(command, arguments)
        assert any(volume.endswith(f":{folder}") for volume in services[name]["volumes"])


def test_the_superlink_is_published_by_its_edge_alone() -> None:
    services = _services("coordinator")
    # The Control API answers the coordinator's own user, who may read the signing key: not the edge.
    assert services["edge"]["user"] == "10002:10002"
    assert not any(str(one).startswith("coordinator:") for one in services["edge"]["volumes"])
    assert services["edge"]["network_mode"] == "service:coordinator"
    assert services["coordinator"]["ports"] == [
        f"443:{services['edge']['environment']['EDGE_PORT']}"
    ]


@pytest.mark.parametrize("name", ["coordinator", "hospital"])
def test_an_image_runs_as_nobody_special_with_what_was_tested(name: str) -> None:
    lines = (DOCKER / f"{name}.Dockerfile").read_text()
    user = next(line for line in lines.splitlines() if line.startswith("USER "))
    assert user.split()[1].split(":")[0] == "10001"
    assert "-c constraints.txt" in lines
    assert "HEALTHCHECK" in lines
    ignored = (DOCKER / f"{name}.Dockerfile.dockerignore").read_text().splitlines()
    # All is left out but what is named: a key or a data set beside it gets into no layer.
    assert "*" in ignored
