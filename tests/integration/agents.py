"""A hospital's agent as the process that it is: `consilium client agent`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from client.agent_control import agent_answers, agent_status
from client.agent_pb2 import AgentStatus
from client.site_config import SiteConfig, load_site_config

PROJECT = Path(__file__).resolve().parents[2]


@dataclass
class AgentProcess:
    """A running agent and the settings of its site."""

    config: SiteConfig
    process: subprocess.Popen[bytes]

    def status(self) -> AgentStatus:
        status = agent_status(self.config.control_socket_path)
        assert status is not None
        return status

    def trains(self) -> bool:
        """Whether it is in the middle of a task's steps."""
        return self.status().work.step > 0

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=180)


@contextmanager
def running_agent(folder: Path) -> Iterator[AgentProcess]:
    """Give a site's agent once it answers; it has ended on leaving."""
    config = load_site_config(folder)
    (folder / "state").mkdir(exist_ok=True)
    with (folder.parent / "agent.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "common.cli", "client", "agent", "--site", str(folder)],
            cwd=PROJECT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(lambda: agent_answers(config.socket_path), process=process)
        yield AgentProcess(config, process)
    finally:
        process.kill()
        process.wait()


def wait_until(
    condition: Callable[[], object],
    *,
    timeout_s: float = 300.0,
    process: subprocess.Popen[bytes] | None = None,
) -> None:
    """Return once a condition holds. process: must live meanwhile."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process is None or process.poll() is None, f"it ended: {process}"
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        time.sleep(0.05)
