"""A whole run's trail: the coordinator's log and its sites' logs vouch for each other."""

from __future__ import annotations

import json
import shutil
import stat
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from client.site import Site
from common.audit_log import AuditEntry, read_audit_log, verify_audit_log
from common.chain import ChainHead
from common.errors import QuorumError
from common.receipts import seal_receipt
from common.signing import SigningKey
from server.audit import CoordinatorAudit
from server.receipt import make_receipt
from simulations.run import run_simulation
from tests.unit.scenarios import interrupt_after, run, simulation, site_names, write_scenario


@pytest.fixture(scope="module")
def finished(scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two rounds; read only."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run(scenario, out)
    return out


def _coordinator(out: Path) -> Path:
    return out / "simulation" / "coordinator"


def _key(out: Path) -> SigningKey:
    return SigningKey.load(_coordinator(out) / "signing.pem")


def _lines(out: Path) -> list[AuditEntry]:
    return list(read_audit_log(_coordinator(out) / "audit.jsonl"))


def _events(out: Path) -> list[str]:
    return [entry.event for entry in _lines(out)]


def test_a_run_leaves_its_trail_from_start_to_finish(finished: Path) -> None:
    asked, answered = ["task"] * 2, ["reply"] * 2
    one_round = [*asked, *answered, "merged", "checkpoint"]
    assert _events(finished) == [
        "run-started", "task", *answered, *one_round, *one_round, "finished", "checkpoint",
    ]  # fmt: skip
    summary = json.loads((finished / "summary.json").read_text())
    lines = {entry.event: entry.fields for entry in _lines(finished)}
    assert {fields["run"] for event, fields in lines.items() if event != "checkpoint"} == {
        summary["run"]
    }
    assert lines["merged"]["sites"] == summary["sites"]
    assert lines["finished"]["adapter"] == lines["merged"]["adapter"]
    path = _coordinator(finished) / "audit.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_each_sides_log_holds_the_anchors_that_the_other_keeps(finished: Path) -> None:
    """Both ways: heads in tasks are the coordinator's, heads in replies are the sites'."""
    kept: list[ChainHead] = []
    for folder in sorted((finished / "simulation" / "sites").iterdir()):
        log = folder / "state" / "audit.jsonl"
        tasks = [entry.fields for entry in read_audit_log(log) if entry.event == "task"]
        kept += [ChainHead(**fields["coordinator_audit"]) for fields in tasks]
        sent = [
            ChainHead(**entry.fields["heads"]["audit"])
            for entry in _lines(finished)
            if entry.event == "reply" and entry.fields["site"] == folder.name
        ]
        key = SigningKey.load(folder / "keys" / "signing.pem").public_hex
        assert verify_audit_log(log, public_hex=key, anchors=sent).anchors == 3
    verified = verify_audit_log(
        _coordinator(finished) / "audit.jsonl",
        public_hex=_key(finished).public_hex,
        anchors=kept,
    )
    # Two rounds, two sites, a task each.
    assert (verified.anchors, verified.unsigned) == (4, 0)


def test_a_run_that_ends_badly_says_so_in_its_trail(tiny_model_dir: Path, tmp_path: Path) -> None:
    strict = {"harbour": {"require-dp": True}}
    scenario = write_scenario(tmp_path / "scenario", tiny_model_dir, policies=strict)
    out = tmp_path / "run"
    with pytest.raises(QuorumError, match=r"1 of the 2 .* refused this run \(harbour: site-policy"):
        run(scenario, out)
    lines = [(entry.event, entry.fields.get("code")) for entry in _lines(out)[-2:]]
    assert lines == [("stopped", "quorum"), ("checkpoint", None)]
    # The site signed what it said, and where its own files stood then.
    (refusal,) = [x.fields for x in _lines(out) if x.event == "reply" and x.fields["error"]]
    assert (refusal["site"], refusal["error"]) == ("harbour", "policy")
    assert refusal["heads"]["ledger"]["count"] == 0


def _interrupted(scenario: Path, out: Path, *, after: int, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_simulation(
            simulation(scenario, out, train__rounds=3, **options), listener=interrupt_after(after)
        )


def test_a_restored_site_is_refused_until_it_settles_a_receipt(
    scenario: Path, tmp_path: Path
) -> None:
    """A backup after round 1, restored after round 2: what round 2 spent would be forgotten."""
    out = tmp_path / "run"
    name = site_names(scenario)[0]
    folder = out / "simulation" / "sites" / name
    _interrupted(scenario, out, after=1)
    shutil.copytree(folder / "state", tmp_path / "backup")
    _interrupted(scenario, out, after=2, resume=True)
    with_round_2 = Site.open(folder).ledger.head()
    shutil.rmtree(folder / "state")
    shutil.copytree(tmp_path / "backup", folder / "state")

    with pytest.raises(QuorumError, match=f"{name}: site-restored"):
        run(scenario, out, resume=True, train__rounds=3)
    assert "behind" in _events(out)

    audit = CoordinatorAudit(_coordinator(out), _key(out))
    seen = audit.seen()
    assert seen[name].ledger == with_round_2
    receipt = make_receipt(read_audit_log(audit.path), site=name, seen=seen, issued_at=1)
    # Round 3 was asked for and, by the site's own word, not done.
    assert [charge.server_round for charge in receipt.charges] == [1, 2]
    Site.open(folder).settle(seal_receipt(receipt, _key(out)))
    audit.note("receipt", site=name, heads=asdict(receipt.heads), charges=2)

    behind = _events(out).count("behind")
    summary = run(scenario, out, resume=True, train__rounds=3)
    assert [entry["round"] for entry in summary["rounds"]] == [1, 2, 3]
    resumed = [entry.fields["round"] for entry in _lines(out) if entry.event == "resumed"]
    assert resumed == [1, 2, 2]
    assert _events(out).count("behind") == behind
    site = Site.open(folder)
    rows = site.ledger.rows(site.config.data.name)
    assert [row.server_round for row in rows] == [1, 2, 3]
