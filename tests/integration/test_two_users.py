"""The shipped systemd units, run by systemd: what a hospital's node can reach, tried from inside it.

Code that the coordinator ships runs as the node, started by its superexec. Here a program in superexec's
place tries to read what is the agent's and to connect to whatever there is; the same program without the unit
shows that it could be had. Agent and node are the real ones.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.node import init_node
from client.provisioning import init_site, join
from client.site import Site
from common.enrolment import Bundle
from common.signing import SigningKey
from server.provisioning import init_coordinator
from tests.integration.machine import PYTHON, SHIPPED, Machine

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

COORDINATOR, ELSEWHERE, NAMES = "203.0.113.10", "198.51.100.7", "198.51.100.53"
AGENT, SOCKET = "/var/lib/consilium-agent", "/run/consilium/agent.sock"
NODE = "/var/lib/consilium-node"
RECORDS_ELSEWHERE = "/srv/notes/records.jsonl"
SECRETS = (
    f"{AGENT}/records.jsonl", f"{AGENT}/site.toml", f"{AGENT}/keys/signing.pem", f"{AGENT}/keys/node",
    f"{AGENT}/state/ledger.sqlite", f"{AGENT}/state/audit.jsonl", RECORDS_ELSEWHERE,
)  # fmt: skip
# What listens on the machine and around it; each says its name to whoever connects.
_WORLD = f"""
import os, socket, threading
def serve(kind, address, name):
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    line = socket.socket(family, kind)
    line.bind(address)
    if isinstance(address, str) and address[0] != "\\0":
        os.chmod(address, 0o666)
    if kind == socket.SOCK_STREAM:
        line.listen()
    def answer():
        while True:
            if kind == socket.SOCK_STREAM:
                caller, _ = line.accept()
                caller.sendall(name.encode())
                caller.close()
            else:
                _, caller = line.recvfrom(512)
                line.sendto(name.encode(), caller)
    threading.Thread(target=answer).start()
os.makedirs("/run/dbus", exist_ok=True)
tcp, udp = socket.SOCK_STREAM, socket.SOCK_DGRAM
serve(tcp, ("{COORDINATOR}", 443), "coordinator")
serve(tcp, ("{COORDINATOR}", 22), "coordinator's ssh")
serve(tcp, ("127.0.0.1", 5432), "database")
serve(tcp, ("0.0.0.0", 8080), "intranet")
serve(tcp, ("{ELSEWHERE}", 443), "elsewhere")
serve(udp, ("127.0.0.53", 53), "stub resolver")
serve(udp, ("{NAMES}", 53), "name server")
serve(tcp, "/run/dbus/system_bus_socket", "bus")
serve(tcp, "\\0abstract", "abstract")
open("/out/world", "w").close()
"""
# What to try is in the file that it is given; what was found goes to its output.
_PROBE = """
import glob, json, os, socket, sys, threading, time
from pathlib import Path
from typing import Any
from client.agent_control import agent_answers
wanted = json.load(open(sys.argv[1]))
found = {"read": {}, "connected": {}, "written": {}, "uid": os.getuid(), "groups": os.getgroups()}

def note(kind, what, try_it):
    try:
        found[kind][what] = try_it()
    except Exception as error:
        found[kind][what] = ["refused", type(error).__name__, str(error)]

def read(path):
    with open(path, "rb") as file:
        return file.read(20).decode("latin-1")

def connect(address, kind="tcp"):
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    line = socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM)
    line.settimeout(5)
    line.connect(address if isinstance(address, str) else tuple(address))
    if kind == "udp":
        line.send(b"?")
    return line.recv(100).decode() or ["refused", "closed", ""]

def knock(path):
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
    return "connected"

def write(path):
    with open(path, "a") as file:
        file.write("x")
    return "written"

for path in wanted["read"]:
    note("read", path, lambda: read(path))
    for other in ("/proc/1/root", "/proc/self/root", "/proc/%d/root" % os.getppid()):
        note("read", other + path, lambda: read(other + path))
for folder in wanted["list"]:
    note("read", folder, lambda: os.listdir(folder) or ["refused", "empty", ""])
note("read", "processes", lambda: [p for p in glob.glob("/proc/[0-9]*/environ") if os.stat(p).st_uid
     not in (os.getuid(), 0)] or ["refused", "none", ""])
for name, (kind, address) in wanted["connect"].items():
    note("connected", name, lambda: connect(address, kind))
note("connected", "agent", lambda: agent_answers(Path(wanted["agent"])) or ["refused", "no answer", ""])
note("connected", "agent's control", lambda: knock(wanted["control"]))
note("connected", "a name", lambda: socket.getaddrinfo("example.org", 443)[0][4][0])
for path in wanted["write"]:
    note("written", path, lambda: write(path))
def replace():
    os.unlink(wanted["agent"])
    return "gone"
if wanted["unlink"]:
    note("written", "the agent's socket", replace)
# The node's own processes talk over its own loopback.
own = socket.create_server(("127.0.0.1", 0)) if wanted["own"] else None
if own:
    threading.Thread(target=lambda: own.accept()[0].sendall(b"own"), daemon=True).start()
    note("connected", "own loopback", lambda: connect(own.getsockname()))
print(json.dumps(found), flush=True)
# Whoever keeps superexec up would start it again.
time.sleep(wanted["stay_s"])
"""
_TRIED = {
    "coordinator": ("tcp", (COORDINATOR, 443)),
    "coordinator's ssh": ("tcp", (COORDINATOR, 22)),
    "database": ("tcp", ("127.0.0.1", 5432)),
    "intranet": ("tcp", ("127.0.0.1", 8080)),
    "elsewhere": ("tcp", (ELSEWHERE, 443)),
    "stub resolver": ("udp", ("127.0.0.53", 53)),
    "name server": ("udp", (NAMES, 53)),
    "bus": ("tcp", "/run/dbus/system_bus_socket"),
    "abstract": ("tcp", "\0abstract"),
    "line": ("tcp", ("127.0.0.1", 443)),
}
_WRITTEN = (
    "/etc/consilium-test",
    "/opt/consilium/bin/consilium",
    f"{AGENT}/x",
    "/usr/bin/x",
    f"{NODE}/x",
)
Found = dict[str, Any]


def _place_probe(machine: Machine, name: str, **wanted: object) -> str:
    """Write what the probe of this name is to try, and return its command line."""
    asked = {"read": SECRETS, "list": (AGENT, f"{AGENT}/keys", "/srv/notes"), "connect": _TRIED,
             "agent": SOCKET, "control": f"{AGENT}/state/agent-control.sock", "write": _WRITTEN,
             "unlink": False, "own": True, "stay_s": 0, **wanted}  # fmt: skip
    machine.write(f"/opt/{name}.json", json.dumps(asked))
    machine.write(f"/opt/{name}", f"{PYTHON} /opt/probe.py /opt/{name}.json\n", mode=0o755)
    return f"/opt/{name}"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Found]]:
    """What the probe found as each of: the node, the agent, the line, and root without a unit."""
    with Machine(tmp_path_factory.mktemp("machine")) as machine:
        _write_hospital(machine, tmp_path_factory.mktemp("hospital"))
        for name, text in (("world", _WORLD), ("probe", _PROBE)):
            machine.write(f"/opt/{name}.py", text)
        addresses = "; ".join(
            f"ip addr add {one}/32 dev outside" for one in (COORDINATOR, ELSEWHERE, NAMES)
        )
        machine.write(
            "/etc/systemd/system/world.service",
            f"[Service]\nExecStartPre=/bin/sh -c '{addresses}'\nExecStart=/usr/bin/python3 /opt/world.py\n"
            "ExecStartPost=/bin/sh -c 'until test -e /out/world; do sleep 0.1; done'\n",
        )
        for unit in ("line.socket", "line.service", "agent.service", "node.service"):
            machine.install(f"consilium-{unit}")
        log = "StandardOutput=append:/out/agent.log\nStandardError=append:/out/agent.log\n"
        machine.drop_in("consilium-agent.service", "log", f"[Service]\n{log}")
        # What `client node` keeps up, and what would start the coordinator's code.
        node = _place_probe(machine, "node", unlink=True, stay_s=600)
        machine.write(
            "/opt/consilium/bin/flower-superexec", f"#!/bin/sh\nexec {node}\n", mode=0o755
        )
        # Beside the units that run, others that differ from them in their command alone.
        shipped = (SHIPPED / "coordinator.conf").read_text()
        machine.drop_in("consilium-line.service", "coordinator", shipped)
        machine.drop_in("line-probe.service", "coordinator", shipped)
        for name in ("agent", "line"):
            command = _place_probe(machine, name, own=False)
            machine.install(f"consilium-{name}.service", f"{name}-probe.service", ExecStart=command,
                            Type="oneshot", Restart="no", StandardOutput=f"file:/out/{name}.json",
                            StandardError=f"file:/out/{name}.err")  # fmt: skip

        def agent_listens() -> bool:
            said = machine.out / "agent.log"
            return said.exists() and "listening" in said.read_text()

        root = _place_probe(machine, "root")
        machine.boot("world.service", "consilium-agent.service", until=agent_listens)
        machine.run("systemctl", "start", "consilium-node", "agent-probe", "line-probe")
        found = {"root": json.loads(machine.run(root))}
        for name in ("agent", "line"):
            found[name] = json.loads((machine.out / f"{name}.json").read_text())
        log_of_node = machine.root / NODE.lstrip("/") / "flower" / "superexec.log"
        deadline = time.monotonic() + 180
        while not (log_of_node.exists() and log_of_node.read_text().endswith("}\n")):
            assert time.monotonic() < deadline, machine.console()
            time.sleep(0.2)
        found["node"] = json.loads(log_of_node.read_text())
        yield found


def _write_hospital(machine: Machine, folder: Path) -> None:
    """A hospital's folder as its commands make it, with what a run leaves in it, and a node's."""
    site, node = folder / "site", folder / "node"
    coordinator = init_coordinator(folder / "coordinator", address="fl.example.org:443")
    enrolment = init_site(site, name="north", declared_size=20, unit="record")
    key = SigningKey.load(coordinator.signing_key).public_hex
    certificate = coordinator.ca.read_text()
    join(site, Bundle("north", "fl.example.org:443", certificate, key, enrolment.signing_key))
    text = (site / "site.toml").read_text()
    (site / "site.toml").write_text(text.replace("state/agent.sock", SOCKET))
    (site / "records.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    opened = Site.open(site)
    opened.ledger.head()
    opened.audit.append("declined", run="a-run")
    init_node(node, opened.config, address="localhost:443")
    machine.copy(node, NODE)
    # As careless as a hospital can be: what keeps the node out is the unit, not the modes.
    for path in (site, *site.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    machine.copy(site, AGENT)
    machine.write(RECORDS_ELSEWHERE, "{}\n")


def _had(found: Found, kind: str) -> dict[str, object]:
    """What was not refused."""
    return {what: got for what, got in found[kind].items()
            if not (isinstance(got, list) and got[0] == "refused")}  # fmt: skip


def test_the_node_reads_nothing_of_the_agents(found: dict[str, Found]) -> None:
    assert found["node"]["uid"] not in (0, found["agent"]["uid"])
    assert _had(found["node"], "read") == {}


def test_the_node_reaches_its_agent_and_its_coordinator_and_nothing_else(
    found: dict[str, Found],
) -> None:
    assert _had(found["node"], "connected") == {
        "agent": True,
        # Its localhost:443, which another process carries to the one address.
        "line": "coordinator",
        "own loopback": "own",
    }


def test_the_node_writes_in_its_own_folder_alone(found: dict[str, Found]) -> None:
    assert _had(found["node"], "written") == {f"{NODE}/x": "written"}


def test_the_agent_reads_its_own_and_reaches_nothing(found: dict[str, Found]) -> None:
    agent = found["agent"]
    assert {path for path in SECRETS if path.startswith(AGENT)} <= set(_had(agent, "read"))
    # Of sockets that it made itself.
    assert _had(agent, "connected") == {"agent": True, "agent's control": "connected"}
    assert _had(agent, "written") == {f"{AGENT}/x": "written"}


def test_the_line_leads_to_the_coordinator_alone(found: dict[str, Found]) -> None:
    line = found["line"]
    assert not [
        path for path in _had(line, "read") if AGENT in path or NODE in path or "srv" in path
    ]
    assert (
        {"coordinator"}
        <= set(_had(line, "connected"))
        <= {"coordinator", "coordinator's ssh", "bus", "abstract"}
    )
    assert _had(line, "written") == {}


def test_without_the_units_all_of_it_could_be_had(found: dict[str, Found]) -> None:
    """Or the tests above would pass where nothing is there to be had."""
    root = found["root"]
    assert set(SECRETS) <= set(_had(root, "read"))
    assert {"database", "intranet", "elsewhere", "stub resolver", "name server", "bus", "abstract",
            "coordinator", "agent", "agent's control"} <= set(_had(root, "connected"))  # fmt: skip
    assert set(_WRITTEN) - {"/opt/consilium/bin/consilium"} <= set(_had(root, "written"))


@pytest.mark.parametrize(
    ("unit", "exposure"), [("agent", 0.5), ("node", 1.0), ("line", 1.5), ("coordinator", 1.5)]
)
def test_systemd_rates_the_units_as_little_exposed(unit: str, exposure: float) -> None:
    """Of 10; what is left is that they use the host's root, and sockets at all."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here: apt-get install systemd")
    threshold = f"--threshold={exposure * 10:.0f}"
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", threshold, SHIPPED / f"consilium-{unit}.service"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
