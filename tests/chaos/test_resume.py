"""A simulated run that is killed with -9 and resumed ends in the very adapter of one that was not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from client.ledger import Ledger
from common.adapter import digest_tensors
from common.audit_log import read_audit_log, verify_audit_log
from common.signing import SigningKey
from server.history import read_events
from tests.chaos.command import Command
from tests.chaos.points import arm, environment, kills
from tests.unit.scenarios import site_names, write_scenario

pytestmark = pytest.mark.chaos

ROUNDS = 4
KILLED = -9


@dataclass(frozen=True)
class Lab:
    """A scenario of two sites, and the command to run it with, whose processes can be killed."""

    scenario: Path
    chaos: Path
    command: Command

    def run(self, out: Path, *more: str) -> int:
        return self.command(
            "simulate", "run", str(self.scenario / "run.toml"), "--out", str(out), *more
        )

    def killed_at(self, point: str, out: Path, *more: str, **narrowing: Any) -> None:
        """Run until it dies at a point."""
        before = len(kills(self.chaos, point))
        arm(self.chaos, point, **narrowing)
        assert self.run(out, *more) == KILLED, self.command.log.read_text()
        assert len(kills(self.chaos, point)) == before + 1


@dataclass(frozen=True)
class Result:
    """What of a run must not depend on whether it was interrupted."""

    adapter_digest: str
    file_sha256: str
    rounds: list[int]
    losses: list[float]
    sites: list[list[str]]
    base: dict[str, float]
    final: dict[str, float]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("resume")
    scenario = write_scenario(
        folder / "scenario",
        Path("embedded"),
        changes={"train.rounds": ROUNDS, "checkpoint.keep": 2},
    )
    chaos = folder / "chaos"
    with Command(environment(chaos), log=folder / "command.log") as command:
        yield Lab(scenario, chaos, command)


@pytest.fixture(scope="module")
def undisturbed(lab: Lab) -> Path:
    """The folder of a run that nobody killed."""
    out = lab.scenario.parent / "undisturbed"
    (lab.chaos / "trace").touch()
    assert lab.run(out) == 0, lab.command.log.read_text()
    (lab.chaos / "trace").unlink()
    return out


def _result(out: Path) -> Result:
    summary = json.loads((out / "summary.json").read_text())
    file = out / "adapter" / "adapter_model.safetensors"
    return Result(
        adapter_digest=digest_tensors(load_file(file)),
        file_sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        rounds=[entry["round"] for entry in summary["rounds"]],
        losses=[entry["loss"] for entry in summary["rounds"]],
        sites=[entry["sites"] for entry in summary["rounds"]],
        base=summary["central"]["base"],
        final=summary["central"]["final"],
    )


def _committed(out: Path) -> list[int]:
    events = read_events(out / "history.jsonl")
    return [event["round"] for event in events if event["event"] == "round"]


def _check(lab: Lab, out: Path, undisturbed: Path) -> None:
    """The same result to the bit, each round on record once, and each site charged once a round."""
    assert _result(out) == _result(undisturbed)
    assert _committed(out) == list(range(1, ROUNDS + 1))
    coordinator = out / "simulation" / "coordinator"
    log = coordinator / "audit.jsonl"
    key = SigningKey.load(coordinator / "signing.pem").public_hex
    verify_audit_log(log, public_hex=key)
    merged = [entry.fields for entry in read_audit_log(log) if entry.event == "merged"]
    assert [fields["round"] for fields in merged] == list(range(1, ROUNDS + 1))
    checkpoint = json.loads(
        (out / "checkpoints" / f"round-{ROUNDS:04d}" / "state.json").read_text()
    )
    assert merged[-1]["adapter"] == checkpoint["adapter_digest"]
    for site in site_names(lab.scenario):
        folder = out / "simulation" / "sites" / site
        rows = Ledger(folder / "state" / "ledger.sqlite").rows(site)
        assert [row.server_round for row in rows] == list(range(1, ROUNDS + 1))
        assert {row.state for row in rows} == {"released"}


def test_a_run_reaches_every_point_but_those_of_a_supernode(lab: Lab, undisturbed: Path) -> None:
    _check(lab, undisturbed, undisturbed)
    result = _result(undisturbed)
    assert result.base["loss"] - result.final["loss"] > 0.01, (
        "the comparison is of trained adapters"
    )
    assert {path.name for path in (lab.chaos / "reached").iterdir()} == {
        "configure",
        "push",
        "pull",
        "mid-train",
        "before-ledger-fsync",
        "after-ledger-fsync",
        "before-merge",
        "in-merge",
        "after-merge",
        "before-checkpoint-rename",
        "after-checkpoint-rename",
    }


def _second_layer_of(server_round: int, out: Path) -> int:
    """How many layers are merged before that one."""
    file = out / "adapter" / "adapter_model.safetensors"
    return (server_round - 1) * len(load_file(file)) // 2 + 1


# Two sites introduce themselves, and two reply in each round: the fifth reply is round 2's first.
_KILLS: dict[str, dict[str, Any]] = {
    "configure": {"skip": 1},
    "pull": {"skip": 4},
    "in-merge": {},
    "before-checkpoint-rename": {"checkpoint": "round-0002"},
    "after-checkpoint-rename": {"checkpoint": "round-0002"},
    "mid-train": {"round": 2},
}


@pytest.mark.parametrize("point", _KILLS)
def test_a_run_killed_in_round_2_and_resumed_ends_in_the_same_adapter_to_the_bit(
    point: str, lab: Lab, undisturbed: Path, tmp_path: Path
) -> None:
    narrowing = _KILLS[point]
    if point == "in-merge":
        narrowing = {"skip": _second_layer_of(2, undisturbed)}
    out = tmp_path / "run"
    lab.killed_at(point, out, **narrowing)
    assert _committed(out) == [1], "it was to die in round 2"

    assert lab.run(out, "--resume") == 0, lab.command.log.read_text()

    _check(lab, out, undisturbed)


def test_a_run_killed_twice_ends_in_the_same_adapter_to_the_bit(
    lab: Lab, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    lab.killed_at("in-merge", out, skip=_second_layer_of(2, undisturbed))
    lab.killed_at("after-checkpoint-rename", out, "--resume", checkpoint="round-0003")
    assert lab.run(out, "--resume") == 0, lab.command.log.read_text()
    _check(lab, out, undisturbed)


def test_a_run_killed_in_its_last_round_only_has_to_export(
    lab: Lab, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    lab.killed_at("after-checkpoint-rename", out, checkpoint=f"round-{ROUNDS:04d}")
    assert not (out / "summary.json").exists()
    assert lab.run(out, "--resume") == 0, lab.command.log.read_text()
    _check(lab, out, undisturbed)
