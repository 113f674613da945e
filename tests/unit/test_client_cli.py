"""`consilium client ...`: approve, ledger, log and dry-run as a person in a hospital sees them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.cli import app
from common.chain import ChainHead
from common.errors import AuditError, ConfigError, PolicyError
from common.receipts import Receipt, seal_receipt
from common.records import SiteHeads
from tests.unit.hospital import SETTINGS, Hospital, make_hospital


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.cli.console._width", 100)


@pytest.fixture
def hospital(tmp_path: Path, tiny_model_dir: Path) -> Hospital:
    return make_hospital(tmp_path / "north", tiny_model_dir, policy={"approval": "ask"})


def _run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 100 for line in result.output.splitlines() if line[:1] in "│┃ ")
    return result.output


def _ask(hospital: Hospital, server_round: int = 0) -> None:
    task = hospital.task(max(server_round, 1))
    if server_round == 0:
        task = replace(task, kind="describe", site="", server_round=0)
    hospital.open().answer(hospital.seal(task))


def test_a_run_is_seen_with_its_cost_and_approved(hospital: Hospital) -> None:
    site = hospital.folder
    assert "0 runs waiting" in _run("approve", "--site", site)
    _ask(hospital)

    shown = _run("approve", "--site", site)
    assert "run-1" in shown
    assert "epsilon of the run" in shown
    assert "6 in 3 rounds" in shown
    assert "and up to 62 ranks more" in shown
    assert "1 run waiting" in shown
    assert "Approved run-1" in _run("approve", "run-1", "--yes", "--site", site)

    _ask(hospital, 1)
    assert len(hospital.open().ledger.rows("notes")) == 1


def test_nothing_is_approved_without_a_yes(hospital: Hospital) -> None:
    _ask(hospital)
    result = CliRunner().invoke(app, ["approve", "run-1", "--site", str(hospital.folder)], "n\n")
    assert result.exit_code == 1
    assert [request.state for request in hospital.open().approvals.all()] == ["waiting"]
    assert "Declined run-1" in _run("approve", "run-1", "--decline", "--site", hospital.folder)
    assert [request.state for request in hospital.open().approvals.all()] == ["declined"]


def test_a_run_that_never_asked_cannot_be_approved(hospital: Hospital) -> None:
    with pytest.raises(ConfigError, match="no run run-7 has asked .*; waiting: none"):
        _run("approve", "run-7", "--site", hospital.folder)


@pytest.fixture
def trained(tmp_path: Path, tiny_model_dir: Path) -> Hospital:
    hospital = make_hospital(tmp_path / "south", tiny_model_dir)
    _ask(hospital, 1)
    refused = hospital.task(2, settings={"lora.rank": 65})
    hospital.open().answer(hospital.seal(refused))
    return hospital


def test_the_ledger_shows_runs_lifetime_and_what_is_left(trained: Hospital) -> None:
    shown = _run("ledger", "--site", trained.folder)
    assert "run-1" in shown
    assert "policy.max-epsilon 10" in shown
    content = json.loads(_run("ledger", "--json", "--site", trained.folder))
    spent = trained.open().ledger.spent("notes", unit="record", delta=1e-5)
    assert content["epsilon"] == pytest.approx(spent)
    assert content["remaining"] == pytest.approx(10 - spent)


def test_the_log_shows_what_left_and_why_something_was_refused(trained: Hospital) -> None:
    shown = _run("log", "--site", trained.folder)
    assert "sent" in shown
    assert "policy.max-rank" in shown
    lines = [
        json.loads(line)
        for line in _run("log", "--json", "--site", trained.folder).split("\n")
        if line
    ]
    assert [line["event"] for line in lines] == ["sent", "refused"]
    assert lines[0]["fields"]["size_bytes"] == len(trained.adapter.to_safetensors())

    manifest = _run("log", "--what", lines[0]["fields"]["manifest"][:9], "--site", trained.folder)
    assert lines[0]["fields"]["adapter_digest"] in manifest
    every = _run("log", "--all", "--site", trained.folder)
    assert "training" in every
    assert "training" not in shown


def test_what_left_is_shown_to_another_program_as_strict_json(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    lax = {"require-dp": False, "max-epsilon": float("inf")}
    hospital = make_hospital(
        tmp_path / "east", tiny_model_dir, policy=lax, settings={"privacy.unit": "none"}
    )
    _ask(hospital, 1)
    (sent,) = [entry.fields for entry in hospital.open().audit.entries() if entry.event == "sent"]

    printed = _run("log", "--what", sent["manifest"][:12], "--json", "--site", hospital.folder)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(printed, parse_constant=refuse)
    assert content["sha256"] == sent["manifest"]
    assert content["adapter_digest"] == sent["adapter_digest"]
    assert content["numbers"] == sent["numbers"] == {"steps": 2}
    assert (content["privacy"]["unit"], content["privacy"]["epsilon"]) == ("none", None)
    assert len(content["tensors"]) == sent["tensors"] > 0
    ledger = json.loads(_run("ledger", "--json", "--site", hospital.folder), parse_constant=refuse)
    assert ledger["epsilon"] is ledger["runs"][0]["epsilon"] is ledger["max_epsilon"] is None


def test_a_verified_log_says_so_and_an_edited_one_where(trained: Hospital) -> None:
    assert "whole and unchanged" in _run("log", "--verify", "--site", trained.folder)
    head = trained.open().audit.head()
    assert "anchors that hold: 1" in _run(
        "log", "--verify", "--anchor", head, "--site", trained.folder
    )
    path = trained.folder / "state" / "audit.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(AuditError, match="the end was cut off"):
        _run("log", "--verify", "--anchor", head, "--site", trained.folder)
    path.write_bytes(b"".join([lines[0].replace(b"run-1", b"run-2"), *lines[1:]]))
    with pytest.raises(AuditError, match="line 1: edited"):
        _run("log", "--verify", "--site", trained.folder)


def test_the_coordinators_heads_are_printed_as_anchors_for_its_own_log(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    hospital = make_hospital(tmp_path / "west", tiny_model_dir)
    head = ChainHead(7, "ab" * 32)
    hospital.open().answer(hospital.seal(hospital.task(1, audit_head=head)))
    assert _run("log", "--anchors", "--site", hospital.folder).split() == [str(head)]


def test_text_from_outside_cannot_break_the_log(trained: Hospital) -> None:
    trained.open().answer(trained.seal(trained.task(1, settings={"model.name": "[/b]"})))
    assert "[/b]" in _run("log", "--site", trained.folder)


def test_an_anchor_that_is_no_head_is_refused(trained: Hospital) -> None:
    with pytest.raises(ConfigError, match="COUNT:DIGEST"):
        _run("log", "--verify", "--anchor", "7", "--site", trained.folder)


def test_a_receipt_is_settled(trained: Hospital, tmp_path: Path) -> None:
    site = trained.open()
    heads = SiteHeads(site.ledger.head(), site.audit.head())
    path = tmp_path / "receipt.json"
    path.write_bytes(seal_receipt(Receipt("north", heads, (), 0), trained.coordinator))
    words = ("ledger", "--settle", path, "--site", trained.folder)
    assert CliRunner().invoke(app, [str(word) for word in words], "n\n").exit_code == 1
    assert "in line with the receipt" in _run(*words, "--yes")
    with pytest.raises(ConfigError, match="cannot be read"):
        _run("ledger", "--settle", tmp_path / "none.json", "--yes", "--site", trained.folder)


def test_before_a_receipt_is_settled_it_is_said_how_far_ahead_it_is(
    trained: Hospital, tmp_path: Path
) -> None:
    site = trained.open()
    ledger, audit = site.ledger.head(), site.audit.head()
    ahead = SiteHeads(ChainHead(ledger.count + 3, "ab" * 32), ChainHead(audit.count + 5, "cd" * 32))
    path = tmp_path / "receipt.json"
    path.write_bytes(seal_receipt(Receipt("north", ahead, (), 0), trained.coordinator))

    words = ["ledger", "--settle", str(path), "--site", str(trained.folder)]
    result = CliRunner().invoke(app, words, "n\n")

    said, asked = result.output.split("Charge what this receipt names?")
    assert result.exit_code == 1
    assert (
        f"ahead of this ledger by 3 entries ({ledger.count + 3} were seen, {ledger.count} are"
        in said
    )
    assert f"audit log by 5 lines ({audit.count + 5} were seen, {audit.count} are here)" in said
    assert "ahead" not in asked
    assert (site.ledger.head(), site.audit.head()) == (ledger, audit)


def test_a_dry_run_trains_and_shows_all_and_sends_charges_and_keeps_nothing(
    trained: Hospital, tmp_path: Path
) -> None:
    run = tmp_path / "run.toml"
    run.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in SETTINGS.items()))
    before = trained.open()
    entries, heads = before.audit.head(), before.ledger.head()
    outbox = sorted((trained.folder / "state" / "outbox").iterdir())

    shown = _run("dry-run", run, "--site", trained.folder)

    assert "What leaves" in shown
    assert "float32" in shown
    assert "12 records" in shown
    after = trained.open()
    assert (after.audit.head(), after.ledger.head()) == (entries, heads)
    assert sorted((trained.folder / "state" / "outbox").iterdir()) == outbox
    content = json.loads(_run("dry-run", run, "--json", "--site", trained.folder))
    assert content["manifest"]["adapter_bytes"] == len(trained.adapter.to_safetensors())
    assert content["cost"]["steps"] == 6


def test_a_dry_run_of_what_the_policy_forbids_says_which_line(
    trained: Hospital, tmp_path: Path
) -> None:
    run = tmp_path / "run.toml"
    run.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in SETTINGS.items()))
    with pytest.raises(PolicyError, match="policy.max-rank = 64"):
        _run("dry-run", run, "--set", "lora.rank=65", "--site", trained.folder)


def test_a_folder_is_named_as_it_is_called(tmp_path: Path) -> None:
    """What stands in square brackets would else be taken for a colour, and go."""
    folder = tmp_path / "north [old]"
    said = _run("init", folder, "--name", "north", "--declared-size", 100)
    assert f"Wrote {folder}: site.toml" in said
    assert f"client join BUNDLE --site {folder}\n" in said
