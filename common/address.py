"""HOST:PORT, as it stands in coordinator.toml and site.toml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator


@dataclass(frozen=True, slots=True)
class Address:
    """A host name or IP address (IPv6 without brackets) and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Return HOST:PORT or [IPV6]:PORT in its parts. Raises ValueError when it is neither."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f'{text!r} is not HOST:PORT; write "consilium.example.org:8000"')
    return Address(host, int(port))


def _checked(text: str) -> str:
    return str(parse_address(text))


HostPort = Annotated[str, AfterValidator(_checked)]
