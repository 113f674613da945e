"""Ports for the tests' servers, which nobody else is given between the choice and the server's start."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle

# Below those that the kernel gives away by itself (32768 on Linux): one of them, let go again, may be another
# test's before the server takes it. Each of pytest-xdist's workers has a part of its own.
_FIRST, _EACH, _PARTS = 20_000, 1_500, 8


def _candidates() -> Iterator[int]:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _PARTS
    ports = list(range(_FIRST + worker * _EACH, _FIRST + (worker + 1) * _EACH))
    # Another run of the tests may go on beside this one.
    random.Random(os.getpid()).shuffle(ports)
    return cycle(ports)


_NEXT = _candidates()


def free_port() -> int:
    """Return a loopback port that nothing listens on, another one each time."""
    while True:
        port = next(_NEXT)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
