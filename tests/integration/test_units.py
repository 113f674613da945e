"""A hospital and a coordinator: set up by the runbooks' commands, run by systemd under the shipped units."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tomli_w
import tomlkit

from simulations.synthetic import SyntheticSpec, generate_hospitals, write_jsonl
from tests.integration.machine import Machine
from tests.integration.sites import SMALL

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

COORDINATOR, AGENT = "/var/lib/consilium-coordinator", "/var/lib/consilium-agent"
NODE, SOCKET = "/var/lib/consilium-node", "/run/consilium/agent.sock"
MODEL = "/opt/consilium/src/simulations/embedded/model"
# Nothing resolves a name but the commands that people give: the node's line goes by address.
NAME, PORT = "fl.example.org", 8443
_RUN = {**SMALL, "model.name": MODEL, "federation.min-sites": 1, "privacy.unit": "record",
        "privacy.target-epsilon": 8.0}  # fmt: skip
_UNITS = ("consilium-agent.service", "consilium-line.socket", "consilium-node.service")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Everything up and enrolled, by both runbooks' "Set up"."""
    folder = tmp_path_factory.mktemp("units")
    spec = SyntheticSpec(num_sites=1, patients_per_site=8, test_records=1, seed=3)
    write_jsonl(
        next(iter(generate_hospitals(spec).sites.values())), folder / "srv" / "records.jsonl"
    )
    (folder / "srv" / "run.toml").write_text(tomli_w.dumps(_RUN))
    with Machine(folder / "machine") as made:
        made.copy(folder / "srv", "/srv/mail")
        made.write("/etc/hosts", f"127.0.0.1 localhost {NAME}\n")
        for unit in ("consilium-coordinator.service", *_UNITS, "consilium-line.service"):
            made.install(unit)
            if unit.endswith(".service"):
                log = f"append:/out/{unit}.log"
                made.drop_in(unit, "log", f"[Service]\nStandardOutput={log}\nStandardError={log}\n")
        made.drop_in(
            "consilium-line.service",
            "coordinator",
            f"[Service]\nEnvironment=COORDINATOR=127.0.0.1:{PORT}\nIPAddressAllow=127.0.0.1\n",
        )
        made.boot()
        _set_up_coordinator(made)
        _set_up_hospital(made)
        yield made


def _set_up_coordinator(machine: Machine) -> None:
    machine.run("consilium", "server", "init", COORDINATOR, "--address", f"{NAME}:{PORT}",
                "--bind-port", str(PORT))  # fmt: skip
    machine.run("chown", "-R", "consilium-coordinator:", COORDINATOR)
    machine.run("systemctl", "enable", "--now", "consilium-coordinator")
    coordinator_says = lambda: machine.run(  # noqa: E731
        "consilium", "server", "status", COORDINATOR, user="consilium-coordinator"
    )
    _wait(machine, lambda: "Nodes: none" in coordinator_says())


def _set_up_hospital(machine: Machine) -> None:
    machine.run("consilium", "client", "init", AGENT, "--name", "north", "--declared-size", "20",
                "--model", MODEL)  # fmt: skip
    machine.run("cp", "/srv/mail/records.jsonl", AGENT)
    site_file = machine.root / AGENT.lstrip("/") / "site.toml"
    site = tomlkit.parse(site_file.read_text())
    site["policy"].update({"approval": "auto", "max-epsilon": 100.0})
    site["agent"]["socket"] = SOCKET
    site_file.write_text(tomlkit.dumps(site))
    machine.run("cp", f"{AGENT}/enrolment.json", "/srv/mail/")
    machine.run("chown", "consilium-coordinator:", "/srv/mail")
    bundle = "/srv/mail/bundle-north.json"
    machine.run("consilium", "server", "enroll", "/srv/mail/enrolment.json", COORDINATOR, "--out", bundle,
                "--yes", user="consilium-coordinator")  # fmt: skip
    machine.run("consilium", "client", "join", bundle, "--site", AGENT, "--yes")
    machine.run("consilium", "client", "node-init", NODE, "--site", AGENT, "--socket", SOCKET,
                "--address", "localhost:443")  # fmt: skip
    machine.run("chown", "-R", "consilium-agent:", AGENT)
    machine.run("chown", "-R", "consilium-node:", NODE)
    machine.run("systemctl", "enable", "--now", *_UNITS)
    machine.run("consilium", "client", "check", "--site", AGENT, user="consilium-agent")


def _run_federation(machine: Machine, name: str, *changes: str) -> dict[str, Any]:
    """Do a run as the coordinator's user, and return its summary."""
    run_dir = f"{COORDINATOR}/runs/{name}"
    changed = [word for change in changes for word in ("--set", change)]
    machine.run("consilium", "server", "run", "/srv/mail/run.toml", COORDINATOR, "--out", run_dir, *changed,
                user="consilium-coordinator", timeout_s=240)  # fmt: skip
    summary: dict[str, Any] = json.loads(_read(machine, f"{run_dir}/summary.json"))
    return summary


def _read(machine: Machine, path: str) -> str:
    return (machine.root / path.lstrip("/")).read_text()


def _agent(machine: Machine, question: str) -> str:
    return machine.run("systemctl", "show", "consilium-agent", "-P", question).strip()


def _agent_log(machine: Machine) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _read(machine, f"{AGENT}/state/audit.jsonl").splitlines()]


def _wait(machine: Machine, condition: Callable[[], object], timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, machine.console()
        time.sleep(0.2)


def test_a_round_is_done_under_the_units_and_the_agent_has_no_network(machine: Machine) -> None:
    summary = _run_federation(machine, "one", "train.rounds=1")
    assert [entry["sites"] for entry in summary["rounds"]] == [["north"]]
    assert summary["privacy"]["north"]["epsilon"] < 8.01

    pid = _agent(machine, "MainPID")
    # Since its network was made nothing was sent in it, nor connected; and it holds no other one's sockets.
    rows = [line.split() for line in _read(machine, f"/proc/{pid}/net/snmp").splitlines()]
    sent = {f"{names[0]}{name}": int(value)
            for names, values in zip(rows[::2], rows[1::2], strict=True)
            for name, value in zip(names[1:], values[1:], strict=True)}  # fmt: skip
    assert (sent["Ip:OutRequests"], sent["Tcp:ActiveOpens"], sent["Udp:OutDatagrams"]) == (0, 0, 0)
    unix = {line.split()[6] for line in _read(machine, f"/proc/{pid}/net/unix").splitlines()[1:]}
    held = machine.run("find", f"/proc/{pid}/fd", "-lname", "socket:*", "-printf", "%l\n").split()
    assert held
    assert {name.removeprefix("socket:[").rstrip("]") for name in held} <= unix


def test_an_agent_that_is_killed_while_it_trains_comes_back_and_both_rounds_are_done(
    machine: Machine,
) -> None:
    killed, known = _agent(machine, "MainPID"), len(_agent_log(machine))
    run = threading.Thread(target=_kill_at_training, args=(machine, known))
    run.start()
    summary = _run_federation(machine, "two", "train.rounds=2", "train.local-steps=6")
    run.join()
    assert [entry["sites"] for entry in summary["rounds"]] == [["north"], ["north"]]
    assert _agent(machine, "NRestarts") == "1"
    assert _agent(machine, "MainPID") not in ("0", killed)
    # Killed in the middle, it trained the same task once more.
    trained = [line["fields"]["round"] for line in _agent_log(machine)[known:]
               if line["event"] == "training"]  # fmt: skip
    assert trained == [1, 1, 2]


def _kill_at_training(machine: Machine, known: int) -> None:
    _wait(machine, lambda: "training" in {line["event"] for line in _agent_log(machine)[known:]})
    machine.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "consilium-agent")


def test_what_is_stopped_ends_by_itself_and_leaves_nothing(machine: Machine) -> None:
    said = json.loads(machine.run("consilium", "client", "status", "--site", AGENT, "--json",
                                  user="consilium-agent"))  # fmt: skip
    assert said["agent"]["pid"] == int(_agent(machine, "MainPID"))
    units = ("consilium-node", "consilium-agent", "consilium-coordinator")
    machine.run("systemctl", "stop", *units)
    for unit in units:
        told = machine.run(
            "systemctl", "show", unit, "--property=Result,ExecMainCode,ExecMainStatus"
        )
        # 1 is that it ended by itself, as against by a signal.
        assert set(told.split()) == {"Result=success", "ExecMainCode=1", "ExecMainStatus=0"}, unit
        # Its command line is all that `ps` shows, and no process of that user is none.
        left = machine.run("sh", "-c", f"ps -u {unit} -o args= || true")
        assert left == "", unit
    assert list((machine.root / "run/consilium").iterdir()) == []
