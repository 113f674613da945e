"""A whole run, by the commands that people give, under strace: nobody connects to another machine."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # ships no types
import pytest

from tests.integration.commands import Commands, Federation
from tests.integration.enrolled import make_and_enrol, must, plan_federation
from tests.integration.traces import Destination, Trace, read_trace, require_strace, traced

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

# The commands that people give, beside the two that stay up.
PEOPLE = "people"
# The C library asks it who a user is, before it looks into /etc/passwd.
NSCD = "/var/run/nscd/socket"
# As client/agent_wire.py names a socket: by the descriptor of its folder.
AGENT = re.compile(r"/proc/self/fd/\d+/agent\.sock")
CONTROL = re.compile(r"/proc/self/fd/\d+/agent-control\.sock")


@dataclass(frozen=True)
class Traced:
    """A run that is over. traces: by who was traced. children: of each site's `up`, by site and name."""

    federation: Federation
    traces: dict[str, Trace]
    children: dict[str, dict[str, int]]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """Everything from `server init` to the end of all processes."""
    require_strace()
    federation = plan_federation(tmp_path_factory.mktemp("traced"))
    files = {
        who: federation.folder / f"{who}.strace" for who in ("server", PEOPLE, *federation.sites)
    }
    with Commands(federation) as commands:
        commands.prefix = {who: traced(file) for who, file in files.items()}
        commands.prefix[""] = commands.prefix.pop(PEOPLE)
        address = f"127.0.0.1:{federation.port}"
        must(commands, "server", "init", federation.coordinator, "--address", address)
        commands.up("server")
        commands.wait_for_superlink()
        for name in federation.sites:
            make_and_enrol(commands, name)
            commands.up(name)
        must(commands, "server", "run", federation.run_file, federation.coordinator)
        children = {
            name: {child: commands.child(name, child) for child in ("agent", "supernode")}
            for name in federation.sites
        }
        for who in (*federation.sites, "server"):
            # strace itself takes no signal.
            [command] = psutil.Process(commands.ups[who].pid).children()
            command.terminate()
        for up in commands.ups.values():
            assert up.wait(timeout=120) == 0, commands.tails()
    return Traced(federation, {who: read_trace(file) for who, file in files.items()}, children)


def _leaving(trace: Trace) -> list[Destination]:
    return [one for one in trace.destinations if one.leaves]


def test_nobody_connects_to_another_machine(whole_run: Traced) -> None:
    assert {who: _leaving(trace) for who, trace in whole_run.traces.items()} == {
        who: [] for who in whole_run.traces
    }


def test_the_trace_saw_what_must_connect(whole_run: Traced) -> None:
    """Or it would show nothing: each hospital's SuperNode, each relay, the ServerApp, `flwr`."""
    port, traces = whole_run.federation.port, whole_run.traces
    for name in whole_run.federation.sites:
        trace = traces[name]
        supernode = trace.of(whole_run.children[name]["supernode"])
        assert any(one.port == port for one in supernode)
        relays = trace.of_program("flwr-clientapp")
        assert any(AGENT.fullmatch(one.path) for one in relays)
    for who, program in (("server", "flwr-serverapp"), ("server", "flwr"), (PEOPLE, "flwr")):
        assert any(one.port == port for one in traces[who].of_program(program)), program


def test_unix_sockets_are_the_agents_alone(whole_run: Traced) -> None:
    for who, trace in whole_run.traces.items():
        paths = {one.path for one in trace.destinations if one.path} - {NSCD}
        others = {path for path in paths if AGENT.fullmatch(path) is None}
        # By the command that keeps the agent up, to see whether it lives.
        assert all(CONTROL.fullmatch(path) for path in others), who
        relayed = {one.path for one in trace.of_program("flwr-clientapp") if one.path}
        assert not any(CONTROL.fullmatch(path) for path in relayed), who
        assert not paths or who in whole_run.federation.sites


def test_the_agent_opens_no_connection_at_all(whole_run: Traced) -> None:
    for name in whole_run.federation.sites:
        agent = whole_run.children[name]["agent"]
        trace = whole_run.traces[name]
        assert agent in trace.programs
        assert {one.path for one in trace.of(agent)} <= {NSCD}


_TRIES = """
import socket, subprocess, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
    {}
"""


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        ('datagram.connect(("127.0.0.1", 9))', False),
        ('datagram.connect(("127.0.0.53", 53))', True),
        ('datagram.connect(("192.0.2.1", 9))', True),
        ('datagram.setblocking(False); datagram.sendto(b"x", ("192.0.2.1", 9))', True),
        ('datagram.sendmsg([b"x"], [], 0, ("192.0.2.1", 9))', True),
        ('socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).connect(("::ffff:192.0.2.1", 9))', True),
    ],
)  # fmt: skip
def test_what_a_grandchild_sends_elsewhere_is_seen(
    tmp_path: Path, attempt: str, expected: bool
) -> None:
    """192.0.2.0/24 is for examples (RFC 5737): nobody is there, and it may have no route here."""
    require_strace()
    script, file = _TRIES.format(attempt), tmp_path / "strace"
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    subprocess.run(
        [*traced(file), sys.executable, "-c", child, script], capture_output=True, check=False
    )
    trace = read_trace(file)
    assert trace.of_program(Path(sys.executable).name) == list(trace.destinations)
    assert [one.leaves for one in trace.destinations if one.ip] == [expected]


@pytest.mark.parametrize(
    "line", ["7 connect(3, 0x7ffd, 16) = -1 EFAULT", "7 connect(3, {sa_family=AF_VSOCK}, 16)", "what"]
)  # fmt: skip
def test_a_line_that_is_not_understood_is_an_error(tmp_path: Path, line: str) -> None:
    (tmp_path / "strace").write_text(f"{line}\n")
    with pytest.raises(ValueError, match="of an unknown form"):
        read_trace(tmp_path / "strace")
