"""The shipped edge before a real coordinator: what a hospital needs passes, and nothing else does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # ships no types
import pytest
import tomli_w
from fastapi.routing import APIRoute, iter_route_contexts
from flwr.superlink.main import create_app

from common.config import read_toml
from server.body_cap import ANYBODY_BYTES, FLEET
from server.coordinator import COORDINATOR_FILE
from server.provisioning import init_coordinator
from tests.integration.commands import Commands, Federation, write_federation
from tests.integration.edge import running_edge
from tests.integration.network import COORDINATOR, hospital_network
from tests.ports import free_port

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

BODY_BYTES = 400_000_000
MAY_GROW_BYTES = 64 * 2**20
# Asks in one go, on the hospital's side of the cable: [[method, path, headers], ...] in, statuses out.
_ASK = """
import http.client, json, ssl, sys
host, port = sys.argv[1:]
context = ssl._create_unverified_context()
found = []
for method, path, headers in json.load(sys.stdin):
    connection = http.client.HTTPSConnection(host, int(port), timeout=120, context=context)
    connection.request(method, path, body=b"x" if method == "POST" else None, headers=headers)
    found.append(connection.getresponse().status)
    connection.close()
print(json.dumps(found))
"""
# Sends a body as long as it is taken, in words of its own so that no library gives up first.
_POST = """
import socket, ssl, sys
host, port, path, size, headers = sys.argv[1:]
raw = socket.create_connection((host, int(port)), timeout=120)
line = ssl._create_unverified_context().wrap_socket(raw)
head = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/protobuf", headers, "", ""]
line.sendall("\\r\\n".join(head).encode())
chunked, sent, piece = "chunked" in headers, 0, b"x" * 2**16
try:
    while sent < int(size):
        line.sendall(b"%x\\r\\n%b\\r\\n" % (len(piece), piece) if chunked else piece)
        sent += len(piece)
except OSError:
    pass
answer = b""
try:
    answer = line.recv(100)
except OSError:
    pass
print(answer.split(b"\\r\\n")[0].decode(), end="")
"""


@dataclass
class Peak:
    """What a group of processes holds, looked at every 50 ms."""

    before_bytes: int
    most_bytes: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def grown_bytes(self) -> int:
        return self.most_bytes - self.before_bytes


def _held_bytes(processes: list[psutil.Process]) -> int:
    held = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            held += process.memory_info().rss
    return held


@contextmanager
def measured(processes: list[psutil.Process]) -> Iterator[Peak]:
    peak = Peak(_held_bytes(processes))

    def look() -> None:
        while not peak.done.wait(0.05):
            peak.most_bytes = max(peak.most_bytes, _held_bytes(processes))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield peak
    finally:
        peak.done.set()
        looking.join()


def put_behind_edge(federation: Federation, port: int) -> None:
    """Write what `server init --bind-port` does: outside is the edge's address, inside is loopback."""
    address = f"{COORDINATOR}:{port}"
    made = init_coordinator(federation.folder / "made", address=address, bind_port=federation.port)
    shutil.copy(made.folder / COORDINATOR_FILE, federation.coordinator)
    for name in federation.sites:
        path = federation.site(name) / "site.toml"
        settings = read_toml(path)
        settings["coordinator"]["address"] = address
        path.write_text(tomli_w.dumps(settings))


@dataclass(frozen=True)
class Deployment:
    """A coordinator that is up behind its edge, and a hospital's network."""

    commands: Commands
    port: int
    edge: psutil.Process
    namespace: str
    log: Path

    def ask(self, *requests: tuple[str, str, dict[str, str]], port: int | None = None) -> list[int]:
        """The statuses that these requests of (method, path, headers) get outside."""
        command = [sys.executable, "-c", _ASK, COORDINATOR, str(port or self.port)]
        answer = subprocess.run(
            ["ip", "netns", "exec", self.namespace, *command],
            input=json.dumps(requests),
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
        )
        found: list[int] = json.loads(answer.stdout)
        return found

    def post(self, path: str, headers: str, *, size: int = BODY_BYTES, inside: bool = False) -> str:
        """Send a long body from outside, or past the edge; return how much was taken, and the answer."""
        host, port = (
            ("127.0.0.1", self.commands.federation.port) if inside else (COORDINATOR, self.port)
        )
        command = [sys.executable, "-c", _POST, host, str(port), path, str(size), headers]
        prefix = [] if inside else ["ip", "netns", "exec", self.namespace]
        answer = subprocess.run([*prefix, *command], check=True, capture_output=True, timeout=300)
        return answer.stdout.decode()

    def superlink_and_edge(self) -> list[psutil.Process]:
        superlink = psutil.Process(self.commands.child("server", "superlink"))
        return [superlink, self.edge, *self.edge.children(recursive=True)]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("edge")
    federation = write_federation(folder, {"train.rounds": 2, "lora.rank": 8}, host=COORDINATOR)
    port = free_port()
    put_behind_edge(federation, port)
    with (
        hospital_network() as namespace,
        Commands(federation) as commands,
    ):
        commands.up("server")
        commands.wait_for_superlink()
        with running_edge(
            folder / "edge",
            port=port,
            name=COORDINATOR,
            tls=federation.coordinator / "tls",
            superlink=f"127.0.0.1:{federation.port}",
        ) as edge:
            for site in federation.sites:
                commands.prefix[site] = ["ip", "netns", "exec", namespace]
                commands.enrol(site)
                commands.up(site)
            yield Deployment(commands, port, edge, namespace, folder / "edge" / "nginx-access.log")


def _routes() -> dict[str, set[str]]:
    """Every path that this Flower's SuperLink serves -> its methods."""
    routes: dict[str, set[str]] = {}
    for context in iter_route_contexts(create_app().routes):
        methods = context.route.methods if isinstance(context.route, APIRoute) else {"GET"}
        routes.setdefault(context.path, set()).update(methods or ())
    return routes


def test_outside_nothing_but_the_fleet_api_and_health_is_answered(deployment: Deployment) -> None:
    routes = _routes()
    asked = [(method, path) for path, methods in routes.items() for method in sorted(methods)]
    control = {path for path in routes if path.startswith("/v1/control/")}
    runtime = {path for path in routes if path.startswith("/v1/runtime/")}
    assert len(control) > 30
    assert len(runtime) > 15
    found = dict(zip(asked, deployment.ask(*((m, p, {}) for m, p in asked)), strict=True))
    answered = {path for (_, path), status in found.items() if status not in (403, 404)}
    assert answered == {path for path in routes if path.startswith(FLEET) or path == "/health"}
    # Flower is asked who it is by the Fleet API: it takes nobody without a node's signature.
    assert {found["POST", path] for path in answered if path != "/health"} <= {400, 401, 415}
    assert found["GET", "/health"] == found["HEAD", "/health"] == 200


def test_no_spelling_of_a_path_gets_around_the_edge(deployment: Deployment) -> None:
    spellings = [
        "/v1/fleet/../control/list-runs", "/v1/fleet/%2e%2e/control/list-runs", "//v1/control/list-runs",
        "/v1/fleet/..%2fcontrol%2flist-runs", "/v1//control/list-runs", "/V1/CONTROL/list-runs",
        "/v1/fleet/%252e%252e/control/list-runs", "/v1/control/list-runs?/v1/fleet/pull-messages",
        "/health/../v1/control/list-runs", "/v1/control/list-runs%23/v1/fleet/x", "/v1/fleet/",
    ]  # fmt: skip
    hosts = ["localhost", "127.0.0.1", "x/v1/control/list-runs?"]
    asked = [
        *(("POST", path, {"Content-Type": "application/protobuf"}) for path in spellings),
        *(("POST", "/v1/control/list-runs", {"Host": host}) for host in hosts),
        *(("POST", "/v1/control/list-runs", {"X-Forwarded-For": "127.0.0.1"}),),
        *((method, "/v1/fleet/pull-messages", {}) for method in ("GET", "PUT", "DELETE")),
    ]
    assert set(deployment.ask(*asked)) <= {400, 403, 404}


def test_an_edge_that_allows_everything_still_leaves_control_to_its_own_machine(
    deployment: Deployment, tmp_path: Path
) -> None:
    """The second net: the SuperLink knows from the edge who is not on its machine."""
    federation, port = deployment.commands.federation, free_port()

    def open_wide(text: str) -> str:
        everything = "proxy_pass https://consilium_superlink;"
        assert "return 403;" in text
        return text.replace("return 403;", everything)

    with running_edge(
        tmp_path / "open",
        port=port,
        name=COORDINATOR,
        tls=federation.coordinator / "tls",
        superlink=f"127.0.0.1:{federation.port}",
        change=open_wide,
    ):
        paths = sorted(
            path for path in _routes() if path.startswith(("/v1/control/", "/v1/runtime/"))
        )
        asked = [("POST", path, {}) for path in paths]
        named = [("POST", path, {"X-Forwarded-For": "127.0.0.1"}) for path in paths]
        assert set(deployment.ask(*asked, *named, port=port)) == {403}


def test_the_superlink_listens_on_loopback_alone(deployment: Deployment) -> None:
    superlink = psutil.Process(deployment.commands.child("server", "superlink"))
    listening = {
        connection.laddr
        for connection in superlink.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert deployment.commands.federation.port in {address.port for address in listening}


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(f"Content-Length: {BODY_BYTES}", id="said"),
        pytest.param("Transfer-Encoding: chunked", id="chunked"),
        pytest.param(f"Content-Length: {6 * 2**20}", id="as-long-as-a-node-may"),
    ],
)
@pytest.mark.parametrize("inside", [False, True], ids=["by-the-edge", "past-the-edge"])
def test_a_long_body_of_nobody_is_not_held_in_memory(
    deployment: Deployment, headers: str, inside: bool
) -> None:
    size = BODY_BYTES if str(BODY_BYTES) in headers or "chunked" in headers else 6 * 2**20
    with measured(deployment.superlink_and_edge()) as peak:
        answer = deployment.post(f"{FLEET}push-object", headers, size=size, inside=inside)
    # Whoever goes on sending may find the line closed before he reads the answer.
    assert not answer or answer.split()[1] in ("400", "401", "411", "413"), answer
    assert peak.grown_bytes < MAY_GROW_BYTES, f"{peak.grown_bytes / 2**20:.0f} MiB"


def test_a_run_completes_while_nobody_pushes_400_mb_again_and_again(deployment: Deployment) -> None:
    """Each by its own line, five lines, all the while that two hospitals train and send."""
    commands, stop, answers = deployment.commands, threading.Event(), list[str]()

    def push() -> None:
        # A pause, since each push starts a Python here: the run shall not starve for the test's own work.
        while not stop.wait(1):
            # One that ends otherwise is no answer; a thread that ends by it would fail the test.
            with suppress(subprocess.SubprocessError):
                answers.append(
                    deployment.post(f"{FLEET}push-object", f"Content-Length: {BODY_BYTES}")
                )

    federation = commands.federation
    out = federation.folder / "run"
    pushing = [threading.Thread(target=push) for _ in range(5)]
    with measured(deployment.superlink_and_edge()) as peak:
        for thread in pushing:
            thread.start()
        try:
            code, output = commands.run(
                *("server", "run", str(federation.run_file), str(federation.coordinator)),
                *("--out", str(out)),
                timeout_s=600,
            )
        finally:
            stop.set()
            for thread in pushing:
                thread.join()
    assert code == 0, output + commands.tails()
    summary = json.loads((out / "summary.json").read_text())
    assert [entry["replies"] for entry in summary["rounds"]] == [2, 2]
    assert len(answers) > 10
    assert {answer.split()[1] for answer in answers if answer} <= {"413"}
    assert peak.grown_bytes < MAY_GROW_BYTES, f"{peak.grown_bytes / 2**20:.0f} MiB"
    # What hospitals sent was of the size that needs a node's signature.
    taken = [line.split() for line in deployment.log.read_text().splitlines()]
    sent = [
        int(size)
        for status, size, path in taken
        if status == "200" and path.endswith("/push-object")
    ]
    assert max(sent) > ANYBODY_BYTES
