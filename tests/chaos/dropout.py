"""Twenty hospitals of which some fail to answer in every round: `python -m tests.chaos.dropout`.

The same run twice, inline: once undisturbed, once with each site failing in each round with a
given probability. One that fails raises, never answers, or answers so late that it does so in a later
round. Time stands still but for sleeping, so that no deadline is waited for.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message
from flwr.clientapp import ClientApp

from common.config import RunConfig, load_run_config
from server.history import read_events
from simulations.inline import InlineGrid
from simulations.run import Simulation, run_simulation
from simulations.scenario import write_synthetic_scenario
from simulations.sites import find_sites
from simulations.synthetic import SyntheticSpec
from tests.unit.fake_federation import FakeClock

NUM_SITES = 20
QUORUM = 10
ROUNDS = 10

# site, round -> "answers", "raises", "silent" or "late"
Fate = Callable[[str, int], str]


def everybody_answers(site: str, server_round: int) -> str:
    """The fate of a run without drop-out."""
    return "answers"


@dataclass(frozen=True)
class DropOut:
    """Each site fails in each round with a probability, by seed; asked again there, it fails again."""

    probability: float
    seed: int

    def __call__(self, site: str, server_round: int) -> str:
        draw = random.Random(f"{self.seed} {site} {server_round}")
        if draw.random() >= self.probability:
            return "answers"
        return draw.choice(["raises", "silent", "late"])


@dataclass(frozen=True)
class Outcome:
    """What a run came to. events: its history."""

    base_loss: float
    final_loss: float
    rounds: list[dict[str, Any]]
    events: list[dict[str, Any]]


class _Clock(FakeClock):
    """Never behind the true one, by which sites judge whether a task has expired."""

    def __init__(self) -> None:
        super().__init__()
        self._started_s = time.time()

    def time(self) -> float:
        return self._started_s + self.now_s


class _DropOutGrid(InlineGrid):
    """Delivers each train task as the fate of its site in that round has it."""

    def __init__(self, fate: Fate, client_app: ClientApp, site_folders: Iterable[Path]) -> None:
        folders = list(site_folders)
        super().__init__(client_app, folders)
        self._fate = fate
        self._sites = dict(zip(self.get_node_ids(), (path.name for path in folders), strict=True))
        self._round = 0
        # Replies, each with the round after which it arrives.
        self._late: list[tuple[int, Message]] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        self._round = max([self._round, *(int(one.metadata.group_id) for one in messages)])
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = set(message_ids)
        due = [
            item
            for item in self._late
            if item[0] < self._round and item[1].metadata.reply_to_message_id in wanted
        ]
        self._late = [item for item in self._late if item not in due]
        replies = [reply for _, reply in due]
        for message in [one for one in self._queue if one.metadata.message_id in wanted]:
            if replies:
                break
            self._queue.remove(message)
            replies += self._answers_to(message)
        return replies

    def _answers_to(self, message: Message) -> list[Message]:
        server_round = int(message.metadata.group_id)
        site = self._sites[message.metadata.dst_node_id]
        fate = self._fate(site, server_round) if server_round else "answers"
        if fate == "raises":
            return [Message(Error(3, "the ClientApp raised"), reply_to=message)]
        if fate == "silent":
            return []
        reply = self._deliver(message)
        if fate == "answers":
            return [reply]
        self._late.append((server_round, reply))
        return []


def write_hospitals(folder: Path) -> Path:
    """Write the scenario of both runs and return its folder."""
    spec = SyntheticSpec(
        num_sites=NUM_SITES, patients_per_site=8, records_per_patient=(3, 3), test_records=48
    )
    config = RunConfig.parse(
        {
            "model.name": "embedded",
            "model.quantization": "none",
            "lora.rank": 4,
            "lora.alpha": 8.0,
            # Attaching an adapter to every layer takes longer than training it.
            "lora.target-modules": "o_proj,down_proj",
            "data.max-length": 48,
            "train.rounds": ROUNDS,
            "train.local-steps": 2,
            "train.batch-size": 4,
            "train.micro-batch-size": 4,
            "train.learning-rate": 5e-3,
            "privacy.unit": "none",
            "evaluation.batch-size": 24,
            "evaluation.every": ROUNDS,
        }
    )
    write_synthetic_scenario(folder, spec, config)
    return folder


def run(scenario: Path, out: Path, fate: Fate) -> Outcome:
    """Run the scenario once, in no longer than its work takes."""
    config = load_run_config(scenario / "run.toml").replace(
        {
            "federation.min-sites": QUORUM,
            "federation.quorum": QUORUM,
            "federation.deadline-s": 60.0,
        }
    )
    simulation = Simulation(config, find_sites(scenario / "sites"), out=out, base_dir=scenario)
    with pytest.MonkeyPatch.context() as patch:
        _Clock().install(patch)
        patch.setattr("simulations.run.InlineGrid", partial(_DropOutGrid, fate))
        summary = run_simulation(simulation)
    return Outcome(
        base_loss=summary["central"]["base"]["loss"],
        final_loss=summary["central"]["final"]["loss"],
        rounds=summary["rounds"],
        events=read_events(out / "history.jsonl"),
    )


def main() -> None:
    """Print both losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--probability", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=2)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scenario = write_hospitals(Path(folder) / "scenario")
        undisturbed = run(scenario, Path(folder) / "undisturbed", everybody_answers)
        fate = DropOut(arguments.probability, arguments.seed)
        disturbed = run(scenario, Path(folder) / "disturbed", fate)
    sys.stdout.write(f"{compared(undisturbed, disturbed)}\n")


def compared(undisturbed: Outcome, disturbed: Outcome) -> str:
    """Return both runs in one sentence."""
    ratio = disturbed.final_loss / undisturbed.final_loss - 1
    replies = [entry["replies"] for entry in disturbed.rounds]
    late = sum(event["event"] == "late" for event in disturbed.events)
    return (
        f"{NUM_SITES} sites, {ROUNDS} rounds, central loss {undisturbed.base_loss:.4f} before; without "
        f"drop-out {undisturbed.final_loss:.4f}, with it {disturbed.final_loss:.4f} ({ratio:+.2%}); "
        f"replies a round {replies}, quorum {QUORUM}, {late} came too late"
    )


if __name__ == "__main__":
    main()
