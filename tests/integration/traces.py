"""What processes connected to, from strace's record of it. A line that is not understood is an error.

commands.prefix["north"] = traced(file); ...; read_trace(file).destinations
"""

from __future__ import annotations

import ipaddress
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_TO = ("connect", "sendto", "sendmsg", "sendmmsg")
_BIRTHS = ("clone", "clone3", "fork", "vfork")
_DNS_PORT = 53

_LINE = re.compile(
    r"(?P<pid>\d+) +(?:(?P<call>\w+)\((?P<arguments>.*)|<\.\.\. (?P<resumed>\w+) resumed>.*|---.*|\+\+\+.*)"
)
_BORN = re.compile(r" = (\d+)$")
_PROGRAM = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ADDRESS = re.compile(
    r'sa_family=(?:AF_INET, sin_port=htons\((?P<port4>\d+)\), sin_addr=inet_addr\("(?P<inet>[^"]+)"\)'
    r'|AF_INET6, sin6_port=htons\((?P<port6>\d+)\).*?inet_pton\(AF_INET6, "(?P<inet6>[^"]+)"'
    r'|AF_UNIX, sun_path=(?P<unix>@?"(?:[^"\\]|\\.)*")'
    # The kernel itself, and nobody: a datagram socket that forgets whom it was connected to.
    r"|AF_NETLINK,|AF_UNSPEC\b)"
)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a process sent something, or tried to. thread: its id, as in `Trace.parents`.

    ip, port: of an INET or INET6 socket, else "" and 0. path: of a unix one, else "".
    """

    thread: int
    ip: str = ""
    port: int = 0
    path: str = ""

    @property
    def leaves(self) -> bool:
        """Whether it is for another machine; a question to a name server is, wherever that listens."""
        return bool(self.ip) and (self.port == _DNS_PORT or not _is_loopback(self.ip))


@dataclass(frozen=True, slots=True)
class Trace:
    """parents: of each thread and process. programs: by thread, the name of what it executed last."""

    destinations: tuple[Destination, ...]
    parents: dict[int, int]
    programs: dict[int, str]

    def of(self, process: int) -> list[Destination]:
        """Where a process, its threads and all its descendants sent something."""
        return [one for one in self.destinations if process in self._line(one.thread)]

    def of_program(self, name: str) -> list[Destination]:
        """Where processes that ran a program of that name, and their descendants, sent something."""
        return [
            one
            for one in self.destinations
            if any(self.programs.get(thread) == name for thread in self._line(one.thread))
        ]

    def _line(self, thread: int) -> list[int]:
        line = [thread]
        while line[-1] in self.parents:
            line.append(self.parents[line[-1]])
        return line


def require_strace() -> None:
    """Skip the test where strace is missing or may not trace."""
    if shutil.which("strace") is None:
        pytest.skip("no strace here; install it to see where the processes connect to")
    tried = subprocess.run(["strace", "-qqq", "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"no right to trace processes here: {tried.stderr.strip()}")


def traced(output: Path) -> list[str]:
    """Return what stands before a command, so that it and its descendants are written to `output`.

    What is sent is left out: `-s 0`.
    """
    calls = ",".join([*_TO, *_BIRTHS, "execve"])
    return ["strace", "-f", "--seccomp-bpf", "-A", "-s", "0", "-e", calls, "-o", str(output)]


def read_trace(file: Path) -> Trace:
    """Return what strace wrote. Raises ValueError for a line, or an address, of an unknown form."""
    destinations: list[Destination] = []
    parents: dict[int, int] = {}
    programs: dict[int, str] = {}
    for line in file.read_text().splitlines():
        found = _LINE.fullmatch(line)
        if found is None:
            raise ValueError(f"strace wrote a line of an unknown form: {line}")
        thread, call = int(found["pid"]), found["call"] or found["resumed"]
        if call in _BIRTHS:
            born = _BORN.search(line)
            if born is not None:
                parents[int(born[1])] = thread
        elif found["call"] == "execve" and (program := _PROGRAM.match(found["arguments"])):
            programs[thread] = Path(program[1]).name
        elif found["call"] in _TO:
            destinations += _destinations(thread, found["call"], found["arguments"])
    return Trace(tuple(destinations), parents, programs)


def _destinations(thread: int, call: str, arguments: str) -> list[Destination]:
    addresses = list(_ADDRESS.finditer(arguments))
    # A connection's own end, which was seen when it was connected.
    nowhere = arguments.count("msg_name=NULL") + (call == "sendto" and ", NULL, 0" in arguments)
    if len(addresses) != arguments.count("sa_family=") or not (addresses or nowhere):
        raise ValueError(f"{call} to an address of an unknown form: {arguments}")
    found = []
    for one in addresses:
        ip = one["inet"] or one["inet6"]
        if ip:
            found.append(Destination(thread, ip=ip, port=int(one["port4"] or one["port6"])))
        elif one["unix"]:
            found.append(Destination(thread, path=one["unix"].replace('"', "")))
    return found


def _is_loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
