"""An outsider who holds the CA certificate alone starts nothing that a hospital executes on data.

What he can do is said here too. From another machine, or as another user of the coordinator's
(test_outside.py): nothing but ask the Fleet API, which knows no node of his. As the coordinator's own user,
whom the Control API does not ask who he is: have code of his run as that user, and at every hospital as the
user of its SuperNode. The first could read the signing key, so whoever gets that far is the coordinator. The
second sees no record and no key where deploy/ is followed, which gives agent and node a user each
(test_two_users.py); here they share one, and what is shown is that the agent's socket, all that such a node
has, gives him nothing.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from client.ledger import Ledger
from common.audit_log import AuditEntry, read_audit_log
from common.flower_process import flower_environment
from common.records import Envelope, open_task, seal_task
from common.signing import SigningKey
from server.coordinator import Coordinator, load_coordinator
from server.flower_control import FlowerControl
from tests.integration.agents import running_agent
from tests.integration.certificates import write_node_key
from tests.integration.commands import Commands, Federation, write_federation
from tests.integration.enrolled import must
from tests.integration.network import COORDINATOR, HOSPITAL, hospital_network
from tests.integration.outsider_app import write_outsider_app
from tests.integration.spoofer import Spoofer
from tests.integration.wiretap import Wiretap, listening

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

SETTINGS = {"train.rounds": 2, "federation.deadline-s": 600.0}
TRUE, TAPPED, OTHER = "harbour", "north", "st-anne"
# Of `_attack`, what the coordinator never signed.
FORGED = ("signed by himself", "changed", "garbage")


@dataclass(frozen=True)
class Started:
    """A coordinator, two hospitals that have trained one run, and a third that is enrolled and away.

    tap: between the second hospital's relay and its agent. honest: adapter digests of the run, by round.
    """

    commands: Commands
    tap: Wiretap
    honest: list[str]

    @property
    def federation(self) -> Federation:
        return self.commands.federation

    @property
    def coordinator(self) -> Coordinator:
        return load_coordinator(self.federation.coordinator)

    @property
    def key(self) -> SigningKey:
        return SigningKey.load(self.coordinator.signing_key)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    federation = write_federation(
        tmp_path_factory.mktemp("outsider"), SETTINGS, host=COORDINATOR, num_sites=3
    )
    assert federation.sites == (TRUE, TAPPED, OTHER)
    for name in federation.sites:
        # Only the outsider comes from elsewhere.
        site_file = federation.site(name) / "site.toml"
        site_file.write_text(site_file.read_text().replace(COORDINATOR, "127.0.0.1"))
    with ExitStack() as stack:
        commands = stack.enter_context(Commands(federation))
        commands.up("server")
        commands.wait_for_superlink()
        for name in federation.sites:
            commands.enrol(name)
        commands.up(TRUE)
        agent = stack.enter_context(running_agent(federation.site(TAPPED)))
        tap = Wiretap(agent.config.socket_path)
        socket = federation.folder / "tap.sock"
        stack.enter_context(listening(tap, socket))
        stack.enter_context(_node(commands, TAPPED, socket))
        yield Started(commands, tap, _run(commands, "honest"))


@contextmanager
def _node(commands: Commands, site: str, socket: Path) -> Iterator[None]:
    """A hospital's connection without its agent; `socket` is where it expects that."""
    folder = commands.federation.folder / f"node-{site}"
    home = commands.federation.site(site)
    must(commands, "client", "node-init", folder, "--site", home, "--socket", socket)
    with commands.start("client", "node", str(folder)) as process:
        try:
            yield
        finally:
            process.terminate()


def _run(commands: Commands, name: str, *more: str) -> list[str]:
    """Run a federation; return the digest of the merged adapter, by round."""
    federation = commands.federation
    out = federation.folder / name
    must(
        commands,
        *("server", "run", federation.run_file, federation.coordinator, "--out", out, *more),
    )
    uid = json.loads((out / "summary.json").read_text())["run"]
    log = read_audit_log(federation.coordinator / "audit.jsonl")
    merged = [line for line in log if line.event == "merged" and line.fields["run"] == uid]
    return [line.fields["adapter"] for line in merged]


def _ledger(started: Started, site: str) -> list[Any]:
    return list(Ledger(started.federation.site(site) / "state" / "ledger.sqlite").rows(site))


def _log(started: Started, site: str) -> list[AuditEntry]:
    return list(read_audit_log(started.federation.site(site) / "state" / "audit.jsonl"))


def _outsider(started: Started, folder: Path, address: str) -> FlowerControl:
    """Flower's own command, as he has it, and the one file that he was given."""
    (folder / "ca.crt").write_bytes(started.coordinator.ca.read_bytes())
    control = FlowerControl(folder, "outside", flower_environment(folder))
    control.connect(address, root_certificates=folder / "ca.crt")
    return control


def test_from_another_machine_every_command_is_refused(started: Started, tmp_path: Path) -> None:
    federation = started.federation
    address = f"{COORDINATOR}:{federation.port}"
    flwr = _outsider(started, tmp_path, address)
    app = write_outsider_app(tmp_path / "app", {})
    key, public = write_node_key(tmp_path, "node")
    known = {node.node_id for node in started.coordinator.control().nodes()}
    superlink = started.coordinator.flower_home / "superlink.log"
    lines = len(superlink.read_text().splitlines())

    with hospital_network() as namespace:

        def said(*command: str) -> str:
            done = subprocess.run(
                ["ip", "netns", "exec", namespace, *command],
                env=flwr.environment,
                cwd=tmp_path,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=120,
                check=False,
            )
            return done.stdout

        as_json = ("outside", "--format", "json")
        run = said("flwr", "run", str(app), *as_json)
        register = said("flwr", "supernode", "register", str(public), *as_json)
        supernode = said(
            *("flower-supernode", "--root-certificates", "ca.crt", "--superlink", address),
            *("--auth-supernode-private-key", str(key), "--isolation", "process"),
        )

    for answer in (run, register):
        assert json.loads(answer)["success"] is False
    assert "Exit Code: 305" in supernode
    refused = " ".join(superlink.read_text().splitlines()[lines:])
    for path in ("/v1/control/start-run", "/v1/control/register-node"):
        assert f"refused {path} from {HOSPITAL}" in refused
    assert {node.node_id for node in started.coordinator.control().nodes()} == known


def test_a_bundle_of_his_own_gets_no_hospital_to_train(started: Started, tmp_path: Path) -> None:
    real, reply = started.tap.answered("train")[0]
    attack = _attack(started, real)
    flwr = _outsider(started, tmp_path, f"127.0.0.1:{started.federation.port}")
    app = write_outsider_app(tmp_path / "app", attack)
    (tmp_path / "over.toml").write_text(tomli_w.dumps({"folder": str(app)}))
    sites = (TRUE, TAPPED)
    ledgers = {site: _ledger(started, site) for site in sites}
    logs = {site: len(_log(started, site)) for site in sites}

    # His code does run there.
    run = flwr.submit(app, tmp_path / "over.toml")
    found_file = app / "found.json"
    started.commands.wait_until(found_file.exists, "both have answered", timeout_s=300)
    flwr.stop(run)
    found = json.loads(found_file.read_text())

    at_true = found[str(started.federation.site(TRUE) / "state" / "agent.sock")]
    at_tapped = found[str(started.federation.folder / "tap.sock")]
    assert at_true.keys() == at_tapped.keys() == {"Status", "Cancel", *attack}
    for answers in (at_true, at_tapped):
        assert all(answers.pop(name).startswith("UNIMPLEMENTED") for name in ("Status", "Cancel"))
        assert all(answers.pop(name) == "INVALID_ARGUMENT, signature" for name in FORGED)
    # Tasks of the other hospital.
    assert set(at_true.values()) == {"INVALID_ARGUMENT, protocol"}
    # What has left already, byte for byte, and nothing that was not asked for in time.
    stored = f"replied {_sha256(reply.adapter)}, {len(reply.adapter)} adapter bytes"
    assert at_tapped == {
        "replayed": stored,
        "replayed with another adapter": stored,
        "expired": "replied expired, 0 adapter bytes",
    }

    assert {site: _ledger(started, site) for site in sites} == ledgers
    new = {site: _log(started, site)[logs[site] :] for site in sites}
    assert {line.event for line in new[TRUE]} == {"refused"}
    assert {line.event for line in new[TAPPED]} == {"refused", "task", "sent"}
    left = {line.fields["adapter_digest"] for line in new[TAPPED] if line.event == "sent"}
    before = _log(started, TAPPED)[: logs[TAPPED]]
    assert left < {line.fields["adapter_digest"] for line in before if line.event == "sent"}


def _attack(started: Started, real: Envelope) -> dict[str, Envelope]:
    """All that he could come by: what he makes himself, and a hospital's task that was recorded."""
    task = open_task(real, public_keys=[started.key.public_hex], site=TAPPED)
    longer = replace(task, expires_at=task.expires_at + 3600)
    own = SigningKey.generate()
    return {
        "signed by himself": seal_task(replace(task, run_uid="his"), own, adapter=real.adapter),
        "changed": Envelope(longer.canonical(), real.signature, real.adapter),
        "garbage": Envelope(b"\x00garbage", b"garbage", b"garbage"),
        "replayed": real,
        "replayed with another adapter": replace(real, adapter=b"another"),
        # A task of long ago, which cannot be waited for.
        "expired": seal_task(replace(task, expires_at=1), started.key, adapter=real.adapter),
    }


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def test_who_answers_in_another_hospitals_name_is_refused_and_changes_nothing(
    started: Started,
) -> None:
    commands, federation = started.commands, started.federation
    spoofer = Spoofer(
        itself=started.coordinator.roster()[OTHER],
        key=SigningKey.load(federation.site(OTHER) / "keys" / "signing.pem"),
        other=TAPPED,
        overheard=started.tap,
        coordinator=started.key.public_hex,
    )
    socket = federation.folder / "spoofer.sock"
    with listening(spoofer, socket), _node(commands, OTHER, socket):
        merged = _run(
            commands,
            "spoofed",
            *("--set", "federation.min-sites=3", "--set", "federation.quorum=2"),
        )
    assert spoofer.tried == [
        "describe: in its name",
        "describe: its own earlier reply",
        "describe: as itself",
        "train: in its name",
        "train: its own earlier reply",
    ]
    # As without it, to the last bit.
    assert merged == started.honest

    summary = json.loads((federation.folder / "spoofed" / "summary.json").read_text())
    assert [one["refused"] for one in summary["rounds"]] == 2 * [{OTHER: "signature"}]
    assert [one["replies"] for one in summary["rounds"]] == [2, 2]
    lines = [
        line
        for line in read_audit_log(federation.coordinator / "audit.jsonl")
        if line.fields.get("run") == summary["run"]
    ]
    believed = Counter(
        (line.fields["site"], line.fields["kind"]) for line in lines if line.event == "reply"
    )
    assert believed == {
        **{(site, "describe"): 1 for site in federation.sites},
        **{(site, "train"): 2 for site in (TRUE, TAPPED)},
    }
    refused = [
        (line.fields["round"], line.fields.get("site", "a node"), line.fields["reason"])
        for line in lines
        if line.event == "refused"
    ]
    assert refused == [
        (0, "a node", "signature"),
        (1, OTHER, "signature"),
        (2, OTHER, "signature"),
    ]
