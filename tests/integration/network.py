"""A network namespace with a cable to this one: a hospital's machine, as far as addresses go."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

# Tests run beside each other, each process with a network of its own.
_NUMBER = os.getpid() % 250
COORDINATOR, HOSPITAL = f"10.213.{_NUMBER}.1", f"10.213.{_NUMBER}.2"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def hospital_network() -> Iterator[str]:
    """Give the name of a namespace that one cable joins to this one; skip without the right to make it."""
    name, here, there = f"csl-{_NUMBER}-hosp", f"csl-{_NUMBER}-here", f"csl-{_NUMBER}-there"
    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no right to make a network namespace here: {error}")
    try:
        ip("link", "add", here, "type", "veth", "peer", "name", there)
        ip("link", "set", there, "netns", name)
        ip("addr", "add", f"{COORDINATOR}/24", "dev", here)
        ip("link", "set", here, "up")
        ip("-n", name, "addr", "add", f"{HOSPITAL}/24", "dev", there)
        ip("-n", name, "link", "set", there, "up")
        ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        # The cable goes with it.
        ip("netns", "del", name)
