"""The checks after a run find each of the faults that they are for; nothing else keeps them honest."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.ledger import Ledger
from common.audit_log import AuditLog, read_audit_log
from common.config import Scalar
from common.signing import SigningKey
from tests.chaos.checks import Trail, check_trail
from tests.unit.scenarios import run, site_names, write_scenario

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The folder of a run of two rounds with differential privacy; read only."""
    folder = tmp_path_factory.mktemp("checks")
    private: dict[str, Scalar] = {"privacy.unit": "record", "privacy.noise-multiplier": 1.0}
    scenario = write_scenario(folder / "scenario", tiny_model_dir, changes=private)
    run(scenario, folder / "run")
    return folder


@pytest.fixture
def trail(finished: Path, tmp_path: Path) -> Trail:
    """A copy to break."""
    out = tmp_path / "run"
    shutil.copytree(finished / "run", out)
    home = out / "simulation"
    names = site_names(finished / "scenario")
    return Trail(out, home / "coordinator", {name: home / "sites" / name for name in names})


def test_a_run_that_nothing_happened_to_is_faultless(trail: Trail) -> None:
    findings = check_trail(trail)
    assert findings.faultless, findings.faults
    # Two rounds of two sites.
    assert (findings.rounds, findings.replies, findings.charges) == (2, 4, 4)
    assert len(findings.faults) == 7


def _rewrite(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    events = [json.loads(line) for line in path.read_text().splitlines()]
    change(events)
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


def _round(events: list[dict[str, Any]], number: int) -> dict[str, Any]:
    return next(e for e in events if e["event"] == "round" and e["round"] == number)


def _faults(trail: Trail) -> dict[str, str]:
    return {name: " / ".join(found) for name, found in check_trail(trail).faults.items() if found}


def _relog(path: Path, key: Path, change: Callable[[list[tuple[str, Any]]], None]) -> None:
    """Write a log anew, honestly chained and signed, with other content."""
    content = [
        (entry.event, dict(entry.fields))
        for entry in read_audit_log(path)
        if entry.event != "checkpoint"
    ]
    change(content)
    path.unlink()
    log = AuditLog(path, SigningKey.load(key))
    for event, fields in content:
        log.append(event, **fields)
    log.checkpoint()


def test_a_round_that_is_lost_or_told_twice_is_found(trail: Trail) -> None:
    history = trail.run_dir / "history.jsonl"
    _rewrite(history, lambda events: events.append(_round(events, 2)))
    assert "rounds [1, 2, 2]" in _faults(trail)["rounds lost or repeated"]
    _rewrite(history, lambda events: events.remove(_round(events, 1)))
    assert "rounds [2, 2]" in _faults(trail)["rounds lost or repeated"]


def test_a_round_that_became_another_one_is_found(trail: Trail) -> None:
    _rewrite(trail.run_dir / "history.jsonl", lambda events: _round(events, 1).update(loss=1.0))
    faults = _faults(trail)["rounds lost or repeated"]
    assert "another one in the checkpoint" in faults
    assert "another one in the summary.json" in faults


def test_a_committed_round_that_is_done_again_is_found(trail: Trail) -> None:
    _rewrite(
        trail.run_dir / "history.jsonl",
        lambda events: events.append({"event": "round-started", "time": 1.0, "round": 2}),
    )
    assert "started again after round 2" in _faults(trail)["committed rounds redone"]

    def ask_again(content: list[tuple[str, Any]]) -> None:
        content.append(next(one for one in content if one[0] == "task" and one[1]["round"] == 1))

    coordinator = trail.coordinator
    _relog(coordinator / "audit.jsonl", coordinator / "signing.pem", ask_again)
    assert "after round 2 was merged" in _faults(trail)["committed rounds redone"]


def _merge_twice(content: list[tuple[str, Any]]) -> None:
    merged = next(fields for event, fields in content if event == "merged")
    merged["sites"] = [merged["sites"][0]] * 2


def _forget_a_reply(content: list[tuple[str, Any]]) -> None:
    trained = (o for o in content if o[0] == "reply" and o[1]["kind"] == "train")
    content.remove(next(trained))


def _answer_otherwise(content: list[tuple[str, Any]]) -> None:
    trained = next(o for o in content if o[0] == "reply" and o[1]["kind"] == "train")
    content.append(("reply", {**trained[1], "adapter": "0" * 64}))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_merge_twice, "merged .* 2 times"),
        (_forget_a_reply, "which had not answered it"),
        (_answer_otherwise, "answered 2 different things"),
    ],
)
def test_an_update_that_counts_twice_or_came_from_nowhere_is_found(
    change: Callable[[list[tuple[str, Any]]], None], found: str, trail: Trail
) -> None:
    coordinator = trail.coordinator
    _relog(coordinator / "audit.jsonl", coordinator / "signing.pem", change)
    faults = _faults(trail)
    assert re.search(found, faults["updates counted twice"])
    # Whoever rewrites a log, even with its key, is found by what the others were sent.
    assert "anchored" in faults["audit logs that do not verify"]


def test_a_charge_that_is_missing_is_found(trail: Trail) -> None:
    folder = next(iter(trail.sites.values()))
    path = folder / "state" / "ledger.sqlite"
    path.unlink()
    Ledger(path)
    faults = _faults(trail)
    assert "was trained and never charged" in faults["epsilon under-counted"]
    assert "was answered and has no row" in faults["epsilon under-counted"]
    assert "more steps are reported than charged" in faults["epsilon under-counted"]
    assert "is reported, and 0.0 is charged" in faults["epsilon under-counted"]
    assert "never stood at" in faults["audit logs that do not verify"]


def test_a_second_output_of_a_task_is_found(trail: Trail) -> None:
    folder = next(iter(trail.sites.values()))

    def send_another(content: list[tuple[str, Any]]) -> None:
        sent = next(o for o in content if o[0] == "sent" and o[1]["adapter_digest"])
        content.append(("sent", {**sent[1], "adapter_digest": "0" * 64}))

    _relog(folder / "state" / "audit.jsonl", folder / "keys" / "signing.pem", send_another)
    assert "sent 2 outputs" in _faults(trail)["second outputs of a task"]


def test_a_round_below_quorum_is_found(trail: Trail) -> None:
    _rewrite(
        trail.run_dir / "history.jsonl",
        lambda events: _round(events, 2).update(sites=["north"], replies=1),
    )
    assert "merged of 1 sites" in _faults(trail)["rounds below quorum"]
