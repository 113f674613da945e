"""Whose process of this machine is at the other end of a connection from it."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterator
from pathlib import Path

# Of this process's own network (proc(5)).
_TABLES = (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6"))
_ESTABLISHED = "01"

Address = tuple[str, int]


def calling_user(client: Address, server: Address) -> int | None:
    """Return the number of the user whose process opened a connection from this machine.

    client, server: the connection's two ends, each an IP address and a port. None when the system names
    no process, as for a connection that its process has closed: the kernel then says that it is root's.
    """
    wanted = {(here, there) for here in _spelt(*client) for there in _spelt(*server)}
    for table in _TABLES:
        try:
            lines = table.read_text().splitlines()[1:]
        except FileNotFoundError:
            continue
        for line in lines:
            _, here, there, state, _, _, _, user, _, inode, *_ = line.split()
            if (here, there) in wanted and state == _ESTABLISHED and inode != "0":
                return int(user)
    return None


def _spelt(host: str, port: int) -> Iterator[str]:
    """Yield the ways in which the tables spell an address: as words of 32 bits in this machine's order."""
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    ways = [address.packed]
    if address.version == 4:
        # As a socket that speaks IPv6 has it.
        ways.append(ipaddress.ip_address(f"::ffff:{address}").packed)
    for packed in ways:
        words = (packed[start : start + 4] for start in range(0, len(packed), 4))
        text = "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
        yield f"{text}:{port:04X}"
