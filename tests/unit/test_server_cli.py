"""`consilium server`: the audit log as a table, as JSON, verified; receipts for restored sites."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from common.audit_log import read_audit_log
from common.chain import ChainHead
from common.config import RunConfig
from common.errors import AuditError, ConfigError
from common.receipts import open_receipt
from common.records import PrivacyRow, Task, reply_to
from common.signing import SigningKey
from server.audit import AUDIT_FILE, KEY_FILE, CoordinatorAudit
from server.cli import _follow, app
from server.exclusions import Exclusions
from server.history import History
from server.launch import Launch
from server.provisioning import init_coordinator
from server.roster import Roster, RosterEntry
from server.run_folder import open_run_folder
from tests.unit.fake_federation import HEADS

KEY = SigningKey.generate()
ROW = PrivacyRow("record", 1.5, 1e-5, 0.8, 0.16, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A coordinator that had one run of one round with bern, and one refusal by oslo."""
    folder = tmp_path / "coordinator"
    folder.mkdir()
    KEY.save(folder / KEY_FILE)
    audit = CoordinatorAudit(folder, KEY)
    config = RunConfig().for_sites()
    run = "0123456789abcdef"
    audit.note("run-started", run=run, round=0, base="ab" * 32, adapter="cd" * 32, config="ef" * 32)
    ask = Task("describe", run, "", 0, 1, 0, config=config)
    audit.task_sent(ask)
    audit.replied(reply_to(ask, site="bern", heads=HEADS), task=ask, size_bytes=700, seen=None)
    audit.note("refused", run=run, round=0, node=17, reason="protocol")
    task = Task("train", run, "bern", 1, 1, 0, config=config)
    audit.task_sent(task, declared_size=100)
    reply = reply_to(task, site="bern", heads=HEADS, privacy=replace(ROW, epsilon=math.inf))
    audit.replied(reply, task=task, size_bytes=1_234_567, seen=None)
    audit.note("refused", run=run, round=1, attempt=1, site="oslo", reason="site-budget")
    behind = replace(HEADS, ledger=ChainHead(2, "00" * 32))
    failed = reply_to(task, site="bern", heads=behind, error_code="restored")
    audit.replied(failed, task=task, size_bytes=1, seen=HEADS)
    audit.note("merged", run=run, round=1, sites=["bern"], adapter="1234567890ab" + "0" * 52)
    audit.note("stopped", run=run, code="quorum")
    return folder


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.cli.console._width", 100)


def _run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "100"})


def _lines(folder: Path) -> list[Any]:
    return list(read_audit_log(folder / AUDIT_FILE))


def test_the_log_is_a_table_within_a_hundred_columns(folder: Path) -> None:
    result = _run("log", folder)
    assert result.exit_code == 0
    shown = result.output.splitlines()
    table = [line.rstrip() for line in shown if AUDIT_FILE not in line]
    assert all(len(line) <= 100 for line in table)
    assert "01234567 " in result.output
    for what in (
        "describe, attempt 1",
        "train, attempt 1",
        "1,234,567 bytes; ledger 4, audit 9",
        "restored; ledger 2, audit 9",
        "ledger 2, was 4; audit 9, was 9",
        "protocol, node 17",
        "site-budget",
        "1 sites, adapter 1234567890ab",
        "quorum",
    ):
        assert what in result.output
    # Eleven events, and a checkpoint each after merged and stopped.
    assert shown[-1] == f"13 of 13 lines of {folder / AUDIT_FILE}"


def test_the_newest_lines_are_shown_unless_all_are_asked_for(folder: Path) -> None:
    assert "2 of 13 lines" in _run("log", folder, "--last", "2").output
    assert "run-started" not in _run("log", folder, "--last", "2").output
    assert "13 of 13 lines" in _run("log", folder, "--last", "0").output


def test_as_json_each_line_is_an_object_that_other_programs_read(folder: Path) -> None:
    lines = _run("log", folder, "--json").output.splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["number"] for entry in entries] == list(range(1, 14))
    replies = [entry["fields"] for entry in entries if entry["event"] == "reply"]
    # No protection: JSON knows no infinity.
    assert replies[1]["privacy"] == {**asdict(ROW), "epsilon": None}
    assert replies[1]["heads"] == asdict(HEADS)


def test_a_log_that_holds_is_said_to_with_where_each_site_was_last_seen(folder: Path) -> None:
    sent = _lines(folder)[3].head
    result = _run("log", folder, "--verify", "--anchor", str(sent))
    assert result.exit_code == 0
    assert f"bern: ledger {HEADS.ledger}\nbern: audit {HEADS.audit}\n" in result.output
    assert (
        "13 lines, whole and unchanged; 2 signed checkpoints, 0 lines after the last; 1 anchors hold. "
        f"Head {_lines(folder)[-1].head}"
    ) in result.output
    content = json.loads(_run("log", folder, "--verify", "--json").output)
    assert (content["lines"], content["checkpoints"], content["anchors"]) == (13, 2, 0)
    assert content["head"] == asdict(_lines(folder)[-1].head)
    assert content["seen"] == {"bern": asdict(HEADS)}


def test_a_log_can_be_verified_where_the_key_is_not(folder: Path) -> None:
    (folder / KEY_FILE).unlink()
    with pytest.raises(ConfigError, match="no signing key at"):
        _raised(_run("log", folder, "--verify"))
    assert _run("log", folder, "--verify", "--public-key", KEY.public_hex).exit_code == 0
    other = SigningKey.generate().public_hex
    with pytest.raises(AuditError, match="signed by another key"):
        _raised(_run("log", folder, "--verify", "--public-key", other))


def _raised(result: Result) -> None:
    """Raise what the command ended with; common.cli makes its exit code of it."""
    assert result.exception is not None
    raise result.exception


@pytest.mark.parametrize("command", [("log",), ("log", "--verify"), ("receipt", "bern")])
def test_a_changed_log_ends_every_command_with_exit_code_6(
    folder: Path, command: tuple[str, ...]
) -> None:
    path = folder / AUDIT_FILE
    path.write_bytes(path.read_bytes().replace(b"site-budget", b"site-policy"))
    # The refusal by oslo.
    with pytest.raises(AuditError, match="line 7: edited") as caught:
        _raised(_run(command[0], *command[1:], folder))
    assert caught.value.exit_code == 6


def test_a_log_cut_before_an_anchor_is_an_error(folder: Path) -> None:
    path, anchor = folder / AUDIT_FILE, _lines(folder)[9].head
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:8]))
    assert _run("log", folder, "--verify").exit_code == 0
    for asked in (["--verify"], []):
        with pytest.raises(AuditError, match="ends at line 8, and line 10 was anchored"):
            _raised(_run("log", folder, *asked, "--anchor", str(anchor)))


def test_an_anchor_that_is_none_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'12' is no head; write COUNT:DIGEST"):
        _raised(_run("log", folder, "--verify", "--anchor", "12"))


def test_a_folder_without_a_log_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="there is no audit log at"):
        _raised(_run("log", tmp_path))


def test_a_receipt_is_signed_for_its_site_and_written_down(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bern.json"
    result = _run("receipt", "bern", folder, "--out", out)
    assert result.exit_code == 0
    assert f"Wrote {out}: 1 charges of bern, ledger at 4, audit log at 9." in result.output
    assert "consilium client ledger --settle bern.json" in result.output
    receipt = open_receipt(out.read_bytes(), public_keys=[KEY.public_hex], site="bern")
    assert receipt.heads == HEADS
    (charge,) = receipt.charges
    assert (charge.unit, charge.server_round, charge.noise_multiplier) == ("record", 1, 0.8)
    assert (charge.sample_rate, charge.steps, charge.answered) == (0.16, 20, True)
    last = _lines(folder)[-1]
    assert last.event == "receipt"
    assert last.fields == {"site": "bern", "heads": asdict(HEADS), "charges": 1}


def test_a_receipt_is_named_for_its_site_unless_told_otherwise(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run("receipt", "bern", folder).exit_code == 0
    assert (tmp_path / "receipt-bern.json").is_file()


def test_no_receipt_is_made_of_a_log_that_another_key_signed(folder: Path, tmp_path: Path) -> None:
    """Its chain holds: only the signatures tell that it was made anew."""
    path, lines = folder / AUDIT_FILE, _lines(folder)
    path.unlink()
    forged = CoordinatorAudit(folder, SigningKey.generate())
    for entry in lines:
        if entry.event != "checkpoint":
            forged.note(entry.event, **entry.fields)
    out = tmp_path / "bern.json"
    with pytest.raises(AuditError, match="line 11: the checkpoint is signed by another key"):
        _raised(_run("receipt", "bern", folder, "--out", out))
    assert not out.exists()


def test_no_receipt_is_written_for_a_stranger(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "rome.json"
    with pytest.raises(ConfigError, match="no site 'rome' has ever answered"):
        _raised(_run("receipt", "rome", folder, "--out", out))
    assert not out.exists()
    assert _lines(folder)[-1].event == "checkpoint"


# Excluding a site


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.toml").touch()
    History(folder / "history.jsonl").record("sites", sites=["bern", "oslo"])
    return folder


def test_a_site_is_shut_out_and_let_in_again_by_command(run_dir: Path) -> None:
    exclusions = Exclusions(run_dir / "excluded.json")
    result = _run("exclude", "bern", run_dir, "--why", "its data set is being corrected")
    assert "excluded bern" in result.output
    assert "has taken no part" not in result.output
    assert exclusions.current()["bern"].why == "its data set is being corrected"
    assert "excluded nobody" in _run("exclude", "bern", run_dir, "--undo").output
    assert exclusions.current() == {}


def test_a_name_that_took_no_part_is_said_to_beside_those_that_did(run_dir: Path) -> None:
    output = _run("exclude", "Bern", run_dir).output
    assert "Bern has taken no part in this run until now; that did: bern, oslo" in output


def test_excluding_from_a_folder_without_a_run_is_an_error_in_words(tmp_path: Path) -> None:
    result = _run("exclude", "bern", tmp_path)
    assert isinstance(result.exception, ConfigError)
    assert "holds no run; give the folder that --out named" in str(result.exception)
    assert not (tmp_path / "excluded.json").exists()


# Following a run


def test_a_run_that_failed_leaves_its_report_and_the_exit_code_of_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator = init_coordinator(tmp_path / "coordinator", address="127.0.0.1:9")
    run = open_run_folder(tmp_path / "run", RunConfig())
    history = History(run.history)
    history.record("run-started", run=run.run_uid, rounds=2, base="ab" * 32)
    history.record("stopped", code="quorum", message="1 of 2 answered")
    coordinator.launches.mkdir()
    launch = Launch(run_dir=str(run.path), key="", roster="")
    launch.save(coordinator.launches, run.run_uid)

    with pytest.raises(typer.Exit) as ended:
        _follow(coordinator, run, title="pilot", folder=coordinator.folder)

    assert ended.value.exit_code == 3
    said = capsys.readouterr().out.replace("\n", "")
    assert "stopped (quorum): 1 of 2 answered" in said
    assert f"Wrote {run.path}/report.html: how far it came" in said
    assert "1 of 2 answered" in (run.path / "report.html").read_text()


def test_a_folder_is_named_as_it_is_called(tmp_path: Path) -> None:
    """What stands in square brackets would else be taken for a colour, and go."""
    folder = tmp_path / "coordinator [new]"
    said = _run("init", folder, "--address", "fl.example.org:8000").output
    assert f"Wrote {folder}: coordinator.toml" in said
    assert f"consilium server up {folder}, then" in said


def test_a_folder_is_named_as_it_is_called_in_a_warning_too(tmp_path: Path) -> None:
    """A site that an earlier version enrolled: which node is its is not on record."""
    folder = tmp_path / "coordinator [/v2]"
    coordinator = init_coordinator(folder, address="fl.example.org:8000")
    entry = RosterEntry("north", SigningKey.generate().public_hex, 100)
    Roster([entry]).save(coordinator.roster_file)
    said = _run("revoke", "north", folder, "--yes")
    assert said.exit_code == 0, said.output
    assert f"consilium server status {folder}" in " ".join(said.output.split())
