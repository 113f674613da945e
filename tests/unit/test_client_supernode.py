"""The SuperNode's launcher: what would leave the node half alive ends the process, by a code of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from client import node, supernode

ROOT = Path(__file__).parents[2]
# Flower's own exit and, as in a SuperNode, an HTTP thread that would keep the process alive.
_LAUNCH = """
import threading, time, sys
import client.supernode
from flwr.supercore.exit import flwr_exit
def node():
    threading.Thread(target=time.sleep, args=(60,)).start()
    {what}
client.supernode.flower_supernode = node
client.supernode.main()
"""


def _launch(what: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _LAUNCH.format(what=what)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_thread_that_dies_ends_the_process_and_says_of_what() -> None:
    done = _launch(
        "def beat(): raise RuntimeError('HTTP 500')\n"
        "    threading.Thread(target=beat, name='heartbeat').start(); time.sleep(60)"
    )
    assert done.returncode == supernode.HALF_DEAD
    assert "heartbeat of the SuperNode died" in done.stderr
    assert "RuntimeError: HTTP 500" in done.stderr


def test_a_main_loop_that_ends_by_itself_ends_the_process() -> None:
    done = _launch("pass")
    assert done.returncode == supernode.HALF_DEAD
    assert "main loop ended" in done.stderr


def test_the_exit_code_that_flower_only_writes_down_is_the_processs_own() -> None:
    # Flower exits with 1 for whatever it calls an error.
    assert _launch("flwr_exit(305, 'refused')").returncode == supernode.CONNECTION_REFUSED
    assert _launch("flwr_exit(302, 'no key')").returncode == 302 & 0xFF
    assert supernode.CONNECTION_REFUSED == 49


def test_a_good_end_stays_one() -> None:
    assert _launch("flwr_exit(0, 'bye')").returncode == 0
    assert _launch("sys.exit()").returncode == 0


@pytest.mark.parametrize("code", [1, 2])
def test_any_other_end_keeps_its_code(code: int) -> None:
    assert _launch(f"sys.exit({code})").returncode == code


def test_who_waits_for_the_superlink_waits_for_this_code() -> None:
    assert node._CONNECTION_REFUSED == supernode.CONNECTION_REFUSED
