"""What the shipped units must not forbid: coordinator, SuperNode and training, run under them by systemd."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from client.provisioning import init_site
from common.config import read_toml
from common.model import digest_model
from common.signing import SigningKey
from server.provisioning import init_coordinator
from simulations.embedded import embedded_model_dir
from simulations.synthetic import SyntheticSpec, generate_hospitals, write_jsonl
from tests.integration.machine import Machine
from tests.integration.sites import SMALL

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

COORDINATOR, AGENT = "/var/lib/consilium-coordinator", "/var/lib/consilium-agent"
NODE = "/var/lib/consilium-node"
MODEL = "/opt/consilium/src/simulations/embedded/model"


def test_coordinator_and_supernode_talk_under_their_units(tmp_path: Path) -> None:
    """The SuperNode's localhost:443 is the coordinator, which says itself that it is not enrolled."""
    with Machine(tmp_path / "machine") as machine:
        init_coordinator(tmp_path / "coordinator", address="127.0.0.1:8443")
        machine.copy(tmp_path / "coordinator", COORDINATOR)
        machine.install("consilium-coordinator.service", StandardOutput="append:/out/coordinator.log",
                        StandardError="append:/out/coordinator.log")  # fmt: skip
        init_site(tmp_path / "site", name="north", declared_size=20, unit="record")
        machine.copy(tmp_path / "site" / "keys", f"{NODE}/keys")
        machine.copy(tmp_path / "coordinator" / "tls", f"{NODE}/tls")
        machine.write(f"{AGENT}/site.toml", "")
        machine.install("consilium-line.socket")
        machine.install("consilium-line.service", Environment="COORDINATOR=127.0.0.1:8443",
                        IPAddressAllow="127.0.0.1")  # fmt: skip
        machine.install("consilium-agent.service", ExecStart="/bin/sleep infinity")
        machine.install(
            "consilium-node.service",
            ExecStart="/opt/consilium/bin/flower-supernode --superlink localhost:443 --isolation process "
            f"--root-certificates {NODE}/tls/ca.crt --auth-supernode-private-key {NODE}/keys/node "
            "--host 127.0.0.1 --port 9094",
            RestartSec="2",
            StandardOutput="append:/out/node.log",
            StandardError="append:/out/node.log",
        )
        # From beside it, as the edge is.
        machine.write(
            "/etc/systemd/system/ask.service",
            "[Unit]\nStartLimitIntervalSec=0\n[Service]\nStandardOutput=append:/out/answer\nStandardError=append:/out/answer.err\nRestart=on-failure\nRestartSec=1\n"
            "ExecStart=/usr/bin/python3 -c 'import ssl, urllib.request as u; "
            'print(u.urlopen("https://127.0.0.1:8443/health", '
            f'context=ssl.create_default_context(cafile="{COORDINATOR}/tls/ca.crt")).status)\'\n',
        )
        answer, said = machine.out / "answer", machine.out / "node.log"
        machine.boot(
            *("consilium-coordinator.service", "ask.service", "consilium-node.service"),
            until=lambda: (
                answer.exists()
                and answer.read_text() == "200\n"
                and "Failed to activate" in said.read_text()
            ),
            timeout_s=80,
        )


def test_a_task_is_trained_under_the_agents_unit(tmp_path: Path) -> None:
    """torch, bitsandbytes and Opacus: no network, no memory that is writable and executable."""
    site = tmp_path / "site"
    init_site(site, name="north", declared_size=20, unit="record")
    hospitals = generate_hospitals(
        SyntheticSpec(num_sites=1, patients_per_site=8, test_records=1, seed=3)
    )
    write_jsonl(next(iter(hospitals.sites.values())), site / "records.jsonl")
    settings = read_toml(site / "site.toml")
    digest = digest_model(embedded_model_dir())
    settings["policy"]["allowed-models"] = [{"name": "model", "path": MODEL, "digest": digest}]
    settings["coordinator"]["public-key"] = SigningKey.generate().public_hex
    (site / "site.toml").write_text(tomli_w.dumps(settings))
    private = {"privacy.unit": "record", "privacy.target-epsilon": 8.0}
    (site / "run.toml").write_text(tomli_w.dumps({**SMALL, **private, "model.name": "model"}))
    with Machine(tmp_path / "machine") as machine:
        machine.copy(site, AGENT)
        machine.install(
            "consilium-agent.service",
            ExecStart=f"/opt/consilium/bin/consilium client dry-run {AGENT}/run.toml --site {AGENT}",
            ExecStopPost="/bin/sh -c 'echo $EXIT_STATUS'",
            Restart="no",
            StandardOutput="append:/out/agent.log",
            StandardError="file:/out/agent.err",
        )
        log = machine.out / "agent.log"
        ended = lambda: log.exists() and log.read_text().endswith(("\n0\n", "\n1\n", "\n2\n"))  # noqa: E731
        machine.boot("consilium-agent.service", until=ended, timeout_s=80)
        assert log.read_text().endswith("\n0\n"), machine.console()
        assert "tensors" in log.read_text()
