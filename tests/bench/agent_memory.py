"""What an adapter of 200 MB each way takes of an agent's memory: python -m tests.bench.agent_memory.

A real agent and a real task, twice: with training, which holds weights, gradients and copies of its own, the
base model loaded before; and again, when its reply is in the outbox already, so that 200 MB come in, 200 MB
go out and nothing is trained: the transport alone. Peaks are sampled every 10 ms from the kernel's counts.
Pages of mapped files are the file cache's, and given back when memory is short.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from client.agent_stub import ask_agent
from common.config import Scalar
from tests.conftest import save_tiny_model
from tests.integration.agents import running_agent
from tests.unit.hospital import make_hospital

SETTINGS: dict[str, Scalar] = {
    "train.local-steps": 1,
    "train.optimizer": "sgd",
    "train.learning-rate": 0.1,
    "train.batch-size": 2,
    "train.micro-batch-size": 1,
    "privacy.unit": "none",
}


@dataclass(frozen=True)
class Share:
    """A peak above idle, in adapters."""

    anonymous: float
    mapped: float
    both: float


@dataclass
class Peak:
    """The highest figures seen, in bytes."""

    anonymous: int = 0
    mapped: int = 0
    both: int = 0

    def see(self, pid: int) -> None:
        """Take the kernel's figures of a process in."""
        found = {}
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("RssAnon", "RssFile"):
                found[name] = int(value.split()[0]) * 1024
        self.anonymous = max(self.anonymous, found["RssAnon"])
        self.mapped = max(self.mapped, found["RssFile"])
        self.both = max(self.both, sum(found.values()))


@contextmanager
def watched(pid: int) -> Iterator[Peak]:
    """Give the peak of a process while the block runs."""
    peak, done = Peak(), threading.Event()

    def look() -> None:
        while not done.is_set():
            peak.see(pid)
            time.sleep(0.01)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def measure(
    folder: Path, *, hidden_size: int, intermediate_size: int, rank: int
) -> tuple[int, dict[str, Share]]:
    """Return the adapter's bytes, and what an agent takes above idle: with training, for transport alone."""
    hospital = make_hospital(
        folder / "north",
        save_tiny_model(
            folder / "model", hidden_size=hidden_size, intermediate_size=intermediate_size
        ),
        policy={"require-dp": False, "max-epsilon": float("inf"), "max-rank": rank},
        settings={**SETTINGS, "lora.rank": rank},
    )
    size, found = len(hospital.adapter.to_safetensors()), {}
    with running_agent(hospital.folder) as agent:
        pid, socket = agent.process.pid, agent.config.socket_path
        # Loads the model.
        ask_agent(socket, hospital.seal(hospital.task()))
        sealed = hospital.seal(hospital.task(2))
        for what in ("with training", "transport alone"):
            idle = Peak()
            idle.see(pid)
            with watched(pid) as peak:
                answer = ask_agent(socket, sealed)
            if len(answer.adapter) != size:
                raise RuntimeError(f"the agent refused the task; see {folder}/agent.log")
            found[what] = Share(
                (peak.anonymous - idle.anonymous) / size,
                (peak.mapped - idle.mapped) / size,
                (peak.both - idle.both) / size,
            )
    return size, found


def main() -> None:
    """Print both peaks."""
    with tempfile.TemporaryDirectory() as folder:
        size, found = measure(Path(folder), hidden_size=2048, intermediate_size=5504, rank=676)
    table = Table(
        "what", "anonymous", "mapped files", "together", title="Peak above idle, in adapters"
    )
    for what, share in found.items():
        row = (share.anonymous, share.mapped, share.both)
        table.add_row(what, *(f"{one:.2f}" for one in row))
    console = Console(width=100)
    console.print(table)
    console.print(f"adapter: {size / 1e6:.1f} MB each way")


if __name__ == "__main__":
    main()
