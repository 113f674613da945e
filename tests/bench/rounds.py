"""What a round costs beside training, and who spends it: `make bench-rounds`.

Two deployments one after the other on this machine, each a coordinator and three hospitals with all of
Flower's processes, TLS and authenticated nodes: with a warm agent at each hospital, and with the site opened
in the ClientApp's own process. A round is counted from the first task sent to the merged update, less the
training steps of the hospital that answered last.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.config import Scalar
from tests.bench.marks import Mark, environment, read_marks
from tests.integration.commands import Commands, write_federation

MODEL = Path(__file__).resolve().parents[2].parent / "shared" / "models" / "stories260K"
SITES = 3
SETTINGS: dict[str, Scalar] = {
    "model.quantization": "nf4",
    "lora.rank": 8,
    "data.max-length": 128,
    "train.local-steps": 2,
    "train.batch-size": 8,
    "train.micro-batch-size": 8,
    "privacy.unit": "record",
    "privacy.target-epsilon": 8.0,
    "federation.min-sites": SITES,
    "federation.quorum": SITES,
    "evaluation.max-records": 8,
}

# On the way of the hospital that answered last: from mark to mark, and who spends the time between them.
LEGS = (
    ("send", "send-end", "ours", "seal the tasks, hand them to the SuperLink"),
    ("send-end", "pull", "Flower", "SuperNode asks again"),
    ("pull", "launch", "Flower", "SuperNode takes it in, superexec finds it"),
    ("launch", "python", "Flower", "ClientApp: Python starts"),
    ("python", "pull_task_input", "Flower", "ClientApp: imports, connects"),
    ("pull_task_input", "relay", "Flower", "ClientApp: input, app unpacked and imported"),
    ("relay", "agent", "ours", "to the site (in the ClientApp: torch is imported)"),
    ("agent", "train", "ours", "signature, policy, ledger, records, model"),
    ("train", "train-end", "training", "steps"),
    ("train-end", "agent-end", "ours", "checks, outbox, audit log, signature"),
    ("agent-end", "relay-end", "ours", "from the agent"),
    ("relay-end", "push_message-end", "Flower", "ClientApp hands the reply over"),
    ("push_message-end", "push-end", "Flower", "SuperNode sends it"),
    ("push-end", "fetch", "ours", "coordinator asks again"),
    ("fetch", "take", "Flower", "coordinator fetches it, object by object"),
    ("take", "take-end", "ours", "screening"),
    ("take-end", "merge-end", "ours", "merge"),
)


@dataclass(frozen=True)
class Round:
    """One round: seconds of each leg on the way of the last hospital; `all_s` from send to merged."""

    number: int
    legs: tuple[float, ...]
    all_s: float

    @property
    def training_s(self) -> float:
        """The steps themselves."""
        return sum(s for s, leg in zip(self.legs, LEGS, strict=True) if leg[2] == "training")

    @property
    def outside_s(self) -> float:
        """All but the steps."""
        return self.all_s - self.training_s

    def of(self, who: str) -> float:
        """What one side spends."""
        return sum(s for s, leg in zip(self.legs, LEGS, strict=True) if leg[2] == who)


def read_rounds(marks: Sequence[Mark], *, sites: dict[str, str]) -> list[Round]:
    """Return the rounds that are whole. sites: name -> FLWR_HOME."""
    sends = {m.said["round"]: m for m in marks if m.name == "send"}
    rounds = []
    for number, send in sorted(sends.items()):
        taken = [m for m in marks if m.name == "take-end" and m.said["round"] == number]
        merged = [m for m in marks if m.name == "merge-end" and m.at > send.at]
        if len(taken) < len(sites) or not merged:
            continue
        last = taken[-1]
        home = sites[last.said["site"]]
        ends = merged[0].at
        way = {m.name: m.at for m in marks if send.at <= m.at <= ends and m.home == home}
        way |= {"send": send.at, "merge-end": ends, "take-end": last.at}
        way["take"] = next(
            m.at for m in marks
            if m.name == "take" and m.said == last.said
        )  # fmt: skip
        way["send-end"] = next(m.at for m in marks if m.name == "send-end" and m.at >= send.at)
        way["fetch"] = max(m.at for m in marks if m.name == "fetch" and m.at < way["take"])
        legs = tuple(way[end] - way[begin] for begin, end, _, _ in LEGS)
        rounds.append(Round(number, legs, ends - send.at))
    return rounds


def run(folder: Path, *, rounds: int, in_process: bool) -> list[Round]:
    """Run a deployment and return its rounds, the first left out: it loads model and records."""
    federation = write_federation(
        folder,
        {**SETTINGS, "model.name": str(MODEL), "train.rounds": rounds + 1},
        num_sites=SITES,
    )
    homes = {name: str(federation.site(name) / "state" / "flower") for name in federation.sites}
    marks = folder / "marks"
    os.environ.update(environment(marks, in_process=in_process))
    with Commands(federation) as commands:
        commands.up("server")
        commands.wait_for_superlink()
        for name in federation.sites:
            commands.enrol(name)
            commands.up(name)
        code, output = commands.run(
            "server", "run", str(federation.run_file), str(federation.coordinator),
            "--out", str(folder / "run"), timeout_s=600,
        )  # fmt: skip
        if code != 0:
            sys.exit(f"{output}\n{commands.tails()}")
    return read_rounds(read_marks(marks), sites=homes)[1:]


def main() -> None:
    """Print both breakdowns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    if not MODEL.is_dir():
        sys.exit(f"{MODEL} is not there; this is measured on a trained model")
    found = {}
    for name, in_process in (("warm agent", False), ("in the ClientApp", True)):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = run(Path(folder), rounds=arguments.rounds, in_process=in_process)
    console = Console(width=100)
    console.print(_table(found))


def _table(found: dict[str, list[Round]]) -> Table:
    names = list(found)
    table = Table(title=f"A round outside training, medians of {len(found[names[0]])}, seconds")
    table.add_column("who")
    table.add_column("what")
    for name in names:
        table.add_column(name, justify="right")
    for index, (_, _, who, what) in enumerate(LEGS):
        cells = [f"{statistics.median(r.legs[index] for r in found[n]):.2f}" for n in names]
        table.add_row(who, what, *cells)
    table.add_section()
    for who in ("Flower", "ours", "training"):
        cells = [f"{statistics.median(r.of(who) for r in found[n]):.2f}" for n in names]
        table.add_row(who, "all of it", *cells)
    cells = [f"{statistics.median(r.outside_s for r in found[n]):.2f}" for n in names]
    table.add_row("both", "a round outside training", *cells)
    return table


if __name__ == "__main__":
    main()
