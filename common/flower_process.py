"""What both sides need to start Flower's processes: environment, commands, ports, a sign of life."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path

from common.errors import EngineError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def flower_environment(home: Path, **changes: str) -> dict[str, str]:
    """Return the environment of Flower's processes: commands by bare name on PATH, nothing phones out.

    What they say to each other on this machine asks no proxy, whatever HTTP_PROXY says.
    home: FLWR_HOME. changes: for this kind of process.
    """
    search = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    exempt = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    no_proxy = ",".join([*([exempt] if exempt else []), *_LOOPBACK])
    return {
        **os.environ,
        # Where both are set, the one in small letters counts.
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "PATH": os.pathsep.join(search),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        **changes,
    }


def find_command(environment: Mapping[str, str], name: str) -> str:
    """Return the path of one of Flower's commands. Raises EngineError when it is not installed."""
    executable = shutil.which(name, path=environment["PATH"])
    if executable is None:
        raise EngineError(
            f"{name} is not on PATH {environment['PATH']!r}; install flwr[simulation]"
        )
    return executable


def free_port() -> int:
    """Return a loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def http_answers(host: str, port: int, *, tls: bool, timeout_s: float = 5.0) -> bool:
    """Whether a Flower server there answers /health: a listening port alone may be a hung process's."""
    if tls:
        # Asked is whether it lives, not who it is.
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, port, timeout=timeout_s, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("HEAD", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
