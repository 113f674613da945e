"""The coordinator's folder: what it needs, what follows from its address, what it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.address import Address, parse_address
from common.errors import ConfigError, EngineError
from common.locks import hold_lock
from server.coordinator import load_coordinator
from server.launch import LAUNCH_VARIABLE
from server.up import coordinator_processes, probed_host, run_coordinator
from tests.unit.coordinator import write_coordinator


def test_bind_and_local_address_follow_from_the_address(tmp_path: Path) -> None:
    coordinator = write_coordinator(tmp_path / "one", address="consilium.example.org:8000")
    assert coordinator.bind == Address("consilium.example.org", 8000)
    assert coordinator.local_address == "consilium.example.org:8000"
    other = write_coordinator(
        tmp_path / "two",
        **{
            "address": "consilium.example.org:443",
            "bind-host": "0.0.0.0",
            "bind-port": 8000,
            "local-address": "localhost:8000",
        },
    )
    assert other.bind == Address("0.0.0.0", 8000)
    assert other.local_address == "localhost:8000"
    assert probed_host(other) == "127.0.0.1"


def test_a_folder_without_its_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no coordinator\.toml in .*give the coordinator's folder"
    ):
        load_coordinator(tmp_path)


def test_every_bad_key_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "coordinator.toml").write_text('[server]\naddress = "nowhere"\nport = 3\n')
    with pytest.raises(ConfigError, match="not usable") as caught:
        load_coordinator(tmp_path)
    assert "server.address: " in str(caught.value)
    assert "is not HOST:PORT" in str(caught.value)
    assert "server.port: " in str(caught.value)


def test_every_missing_file_is_named_at_once(tmp_path: Path) -> None:
    coordinator = write_coordinator(tmp_path / "one")
    coordinator.certificate_key.unlink()
    coordinator.signing_key.unlink()
    with pytest.raises(ConfigError, match=r"lacks tls/server\.key, signing\.pem; restore"):
        load_coordinator(coordinator.folder)


def test_the_superlink_is_closed_to_strangers_and_the_secrets_stay_off_the_command_line(
    tmp_path: Path,
) -> None:
    coordinator = write_coordinator(tmp_path / "one")
    superlink, superexec = coordinator_processes(coordinator)
    assert "--enable-supernode-auth" in superlink.command
    assert "--insecure" not in superlink.command + superexec.command
    for process in (superlink, superexec):
        assert process.environment["FLWR_TELEMETRY_ENABLED"] == "0"
        assert process.environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
        assert str(coordinator.superexec_secret) in process.command
    assert "--disable-runtime-dependency-installation" in superlink.command
    assert superexec.environment[LAUNCH_VARIABLE] == str(coordinator.launches)
    assert LAUNCH_VARIABLE not in superlink.environment


def test_a_second_up_is_refused(tmp_path: Path) -> None:
    coordinator = write_coordinator(tmp_path / "one")
    with (
        hold_lock(coordinator.up_lock),
        pytest.raises(EngineError, match=r"is `consilium server up` for .*kill \d+"),
    ):
        run_coordinator(coordinator)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("localhost:8000", Address("localhost", 8000)),
        ("10.0.0.1:1", Address("10.0.0.1", 1)),
        ("[::1]:8000", Address("::1", 8000)),
    ],
)
def test_an_address_is_host_and_port_and_is_written_as_it_was(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:x", "host:70000", "::1:80"])
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r'is not HOST:PORT; write "'):
        parse_address(text)
