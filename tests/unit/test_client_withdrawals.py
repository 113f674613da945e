"""Leaving a coordinator: nothing of it is done from that moment on, and the statement is the site's own."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w
from typer.testing import CliRunner

from client.cli import app
from client.withdrawals import Withdrawals, withdraw
from common.audit_log import read_audit_log
from common.errors import ConfigError, PolicyError
from common.locks import lock_holder
from common.membership import open_withdrawal
from common.records import Reply, open_reply
from common.signing import SigningKey
from tests.unit.hospital import Hospital, make_hospital


@pytest.fixture
def hospital(tmp_path: Path, tiny_model_dir: Path) -> Hospital:
    return make_hospital(tmp_path / "north", tiny_model_dir)


def _describe(hospital: Hospital, key: SigningKey | None = None) -> Reply:
    site = hospital.open()
    task = hospital.task(0, kind="describe", site="", adapter_digest="")
    answer = site.answer(hospital.seal(task, key))
    return open_reply(answer, task=task, site="north", public_hex=site.public_key)


def test_a_process_that_runs_already_does_nothing_more_for_a_coordinator_that_was_left(
    hospital: Hospital,
) -> None:
    site, task = hospital.open(), hospital.task()
    withdraw(site.config)
    reply = open_reply(
        site.answer(hospital.seal(task)), task=task, site="north", public_hex=site.public_key
    )
    assert reply.error_code == "policy"
    assert site.ledger.rows("notes") == []
    assert [line.event for line in read_audit_log(site.audit.path)] == [
        "withdrawn", "checkpoint", "refused",
    ]  # fmt: skip


def test_it_does_not_even_say_how_large_it_is(hospital: Hospital) -> None:
    assert _describe(hospital).numbers
    withdraw(hospital.open().config)
    reply = _describe(hospital)
    assert (reply.error_code, dict(reply.numbers)) == ("policy", {})


def test_the_statement_is_signed_and_names_both(hospital: Hospital) -> None:
    site = hospital.open()
    said = open_withdrawal(withdraw(site.config).read_bytes())
    assert (said.site, said.signing_key) == ("north", site.public_key)
    assert said.coordinator == hospital.coordinator.public_hex
    assert open_withdrawal(withdraw(site.config).read_bytes()).at == said.at


def test_another_coordinator_is_served_as_before(hospital: Hospital) -> None:
    other = SigningKey.generate()
    path = hospital.folder / "site.toml"
    tree = tomllib.loads(path.read_text())
    tree["coordinator"]["public-key"] = [hospital.coordinator.public_hex, other.public_hex]
    path.write_text(tomli_w.dumps(tree))
    config = hospital.open().config
    with pytest.raises(ConfigError, match="believes 2 coordinators; name the one to leave"):
        withdraw(config)
    with pytest.raises(ConfigError, match="is none that site.toml names"):
        withdraw(config, coordinator="ab" * 32)
    assert Withdrawals(hospital.folder).all() == {}
    withdraw(config, coordinator=hospital.coordinator.public_hex)
    assert _describe(hospital).error_code == "policy"
    assert _describe(hospital, other).error_code == ""


def test_coming_back_is_an_act_of_the_hospitals_own(hospital: Hospital) -> None:
    withdraw(hospital.open().config)
    known, key = Withdrawals(hospital.folder), hospital.coordinator.public_hex
    with pytest.raises(PolicyError, match=r"withdrew from coordinator .* join it again"):
        known.check(key)
    known.lift(key)
    known.check(key)
    assert _describe(hospital).error_code == ""


def test_a_damaged_list_refuses_everybody(hospital: Hospital) -> None:
    (hospital.folder / "state").mkdir(exist_ok=True)
    (hospital.folder / "state" / "withdrawn.json").write_text("[]")
    assert _describe(hospital).error_code == "config"


@pytest.mark.parametrize("command", ["up", "agent"])
def test_the_command_ends_what_runs_and_says_what_stays(hospital: Hospital, command: str) -> None:
    lock = hospital.folder / "state" / f"{command}.lock"
    lock.parent.mkdir(exist_ok=True)
    code = (
        "import sys, time; from pathlib import Path; from common.locks import hold_lock\n"
        "with hold_lock(Path(sys.argv[1])): print(1, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE) as up:
        assert up.stdout is not None
        up.stdout.readline()
        done = CliRunner().invoke(app, ["withdraw", "--site", str(hospital.folder), "--yes"])
        assert up.wait(timeout=60) == -15
    assert lock_holder(lock) is None
    said = " ".join(done.output.split())
    assert f"`consilium client {command}` was ended" in said
    assert "consilium server revoke SITE DIR --withdrawal FILE" in said
    assert "stays in their adapters" in said
