"""kill -9 of a hospital's process while it answers, and what is there when it starts again.

At the end of each phase: done on disk, and nobody told. And at random lines, in each phase in turn:
CONSILIUM_KILLS says how many (4; 20 is the long form), CONSILIUM_KILL_SEED which.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.ledger import Ledger, LedgerRow
from common.audit_log import read_audit_log, verify_audit_log
from common.privacy import GaussianSteps
from common.records import Reply, Task, open_reply
from common.signing import SigningKey
from tests.chaos.answer import PHASES, pack, unpack
from tests.unit.hospital import Hospital, make_hospital

pytestmark = pytest.mark.chaos

KILLS = int(os.environ.get("CONSILIUM_KILLS", "6"))
SEED = int(os.environ.get("CONSILIUM_KILL_SEED", "0"))
KILLED = -9
# Of the hospital below: its noise, 4 of 12 records, 2 steps.
CHARGE = GaussianSteps(2.0, 4 / 12, 2)


class Agent:
    """A hospital's process that is started again for every task."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.answer"],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(
        self, hospital: Hospital, task: Task, reply: Path, *, kill: tuple[str, int] | None = None,
        **more: str,
    ) -> int:  # fmt: skip
        """Have a task answered into the file `reply`; return the exit status of who did it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        sealed = hospital.folder.parent / "task.json"
        sealed.write_bytes(pack(hospital.seal(task)))
        order: dict[str, Any] = {
            "folder": str(hospital.folder),
            "task": str(sealed),
            "reply": str(reply),
            "kill": kill,
        }
        self._process.stdin.write(json.dumps({**order, **more}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(240)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    agent = Agent()
    yield agent
    agent.close()


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Hospital:
    """A hospital that nobody has asked anything yet; every kill has a copy of its own."""
    folder = tmp_path_factory.mktemp("template") / "north"
    # A given noise, since calibrating it takes longer than all the rest.
    return make_hospital(
        folder, tiny_model_dir, settings={"privacy.noise-multiplier": CHARGE.noise_multiplier}
    )


@pytest.fixture(scope="module")
def num_lines(
    agent: Agent, hospital: Hospital, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, int]:
    """How many lines each phase of an undisturbed answer has."""
    folder = tmp_path_factory.mktemp("counted")
    counted = _copy(hospital, folder)
    lines = folder / "lines.json"
    status = agent.ask(counted, counted.task(), folder / "reply.json", lines=str(lines))
    assert status == 0
    found: dict[str, int] = json.loads(lines.read_text())
    assert set(found) == set(PHASES)
    return found


@pytest.mark.parametrize("phase", PHASES)
def test_a_site_killed_at_the_end_of_a_phase_goes_on_from_there(
    phase: str, agent: Agent, hospital: Hospital, tmp_path: Path
) -> None:
    _check_kill(agent, _copy(hospital, tmp_path), tmp_path, kill=(phase, 0))


@pytest.mark.parametrize("number", range(KILLS))
def test_a_site_killed_at_a_random_line_forgets_no_charge_and_makes_no_second_output(
    number: int, agent: Agent, hospital: Hospital, num_lines: Mapping[str, int], tmp_path: Path
) -> None:
    phase = list(PHASES)[number % len(PHASES)]
    line = random.Random(f"{SEED} {number}").randint(1, num_lines[phase])
    _check_kill(agent, _copy(hospital, tmp_path), tmp_path, kill=(phase, line))


def _check_kill(agent: Agent, hospital: Hospital, folder: Path, *, kill: tuple[str, int]) -> None:
    task = hospital.task()
    first, second, third = (folder / f"reply-{number}.json" for number in (1, 2, 3))

    assert agent.ask(hospital, task, first, kill=kill) == KILLED, kill

    before = _rows(hospital)
    trained = [entry for entry in _events(hospital) if entry == "training"]
    assert len(before) == 1 or (kill[0] == "reserve" and not before), f"{kill}: the charge is gone"
    assert not trained or before, f"{kill}: records were opened before they were charged"
    assert not first.exists() or before[0].state == "released", kill
    # The coordinator asks again as it would: the very same, then with another attempt and deadline.
    again = replace(task, attempt=2, expires_at=task.expires_at + 60)
    assert agent.ask(hospital, task, second) == 0, f"{kill}: the next start does not work"
    assert agent.ask(hospital, again, third) == 0, f"{kill}: the next start does not work"

    replies = [
        _open(hospital, file, asked)
        for file, asked in ((first, task), (second, task), (third, again))
        if file.exists()
    ]
    assert len({reply.adapter_digest for reply in replies}) == 1, f"{kill}: a second output"
    after = _rows(hospital)
    assert [(row.state, row.steps) for row in after] == [("released", CHARGE)], kill
    assert [row.without_state for row in after] == [row.without_state for row in before or after], (
        f"{kill}: charged twice, or otherwise"
    )
    assert len({reply.privacy for reply in replies}) == 1, kill
    _check_records(hospital, replies, kill)


def _check_records(hospital: Hospital, replies: list[Reply], kill: tuple[str, int]) -> None:
    """The audit log holds, up to and beyond every head that the coordinator was sent."""
    heads = [reply.heads for reply in replies if reply.heads is not None]
    assert len(heads) == len(replies)
    verified = verify_audit_log(
        _audit(hospital), public_hex=_public(hospital), anchors=[head.audit for head in heads]
    )
    assert verified.anchors == len({head.audit for head in heads}), kill
    ledger = Ledger(hospital.folder / "state" / "ledger.sqlite")
    assert all(ledger.covers(head.ledger) for head in heads), kill
    sent = [entry.fields for entry in read_audit_log(_audit(hospital)) if entry.event == "sent"]
    assert {entry["adapter_digest"] for entry in sent} == {replies[0].adapter_digest}, kill
    assert len(sent) >= len(replies), f"{kill}: something left that is not on record"


def _copy(hospital: Hospital, folder: Path) -> Hospital:
    shutil.copytree(hospital.folder, folder / "north")
    return replace(hospital, folder=folder / "north")


def _rows(hospital: Hospital) -> list[LedgerRow]:
    return Ledger(hospital.folder / "state" / "ledger.sqlite").rows("notes")


def _audit(hospital: Hospital) -> Path:
    return hospital.folder / "state" / "audit.jsonl"


def _events(hospital: Hospital) -> list[str]:
    return [entry.event for entry in read_audit_log(_audit(hospital))]


def _public(hospital: Hospital) -> str:
    return SigningKey.load(hospital.folder / "keys" / "signing.pem").public_hex


def _open(hospital: Hospital, file: Path, task: Task) -> Reply:
    envelope = unpack(file.read_bytes())
    reply = open_reply(envelope, task=task, site="north", public_hex=_public(hospital))
    assert reply.error_code == "", "the next start does not work"
    return reply
