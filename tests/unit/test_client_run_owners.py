"""A run is the coordinator's that began it, whatever other coordinators the site believes."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest

from client.run_owners import RunOwners
from common.errors import ConfigError, PolicyError, ProtocolError
from common.records import Reply, Task, open_reply
from common.signing import SigningKey
from tests.unit.hospital import Hospital, make_hospital
from tests.unit.ready_site import edited

NORTH, SOUTH = "ab" * 32, "cd" * 32


def _owners(folder: Path, *, begun: bool = True) -> RunOwners:
    return RunOwners(folder, is_begun=lambda run_uid: begun)


def test_a_run_is_its_first_coordinators_for_good(tmp_path: Path) -> None:
    owners = _owners(tmp_path / "run-owners")
    owners.check("run-1", SOUTH)
    owners.bind("run-1", NORTH)

    again = _owners(tmp_path / "run-owners")
    again.clear("run-1")
    again.check("run-1", NORTH)
    again.bind("run-1", NORTH)
    for refuse in (again.check, again.bind):
        with pytest.raises(PolicyError, match=r"run-1 was begun here by coordinator abab.* cdcd"):
            refuse("run-1", SOUTH)
    again.bind("run-2", SOUTH)
    assert stat.S_IMODE((tmp_path / "run-owners" / "run-1").stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"ab" * 31, b"AB" * 32])
def test_a_damaged_file_is_nobodys_permission(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run-1").write_bytes(content)
    with pytest.raises(ConfigError, match="run-1 is damaged; put its backup there"):
        _owners(tmp_path).bind("run-1", NORTH)


def test_a_name_that_is_no_file_name_reaches_no_file(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="a run is named by"):
        _owners(tmp_path).bind("../seen.json", NORTH)


@pytest.mark.parametrize("content", [NORTH.encode(), b"no key"])
def test_the_file_of_a_run_that_was_never_charged_is_nobodys_claim(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "run-1").write_bytes(content)
    before = _owners(tmp_path, begun=False)
    before.check("run-1", SOUTH)
    before.clear("run-1")

    after = _owners(tmp_path)
    after.bind("run-1", SOUTH)
    assert (tmp_path / "run-1").read_text() == SOUTH
    with pytest.raises(PolicyError, match="begun here by coordinator cdcd"):
        after.check("run-1", NORTH)


@pytest.fixture
def shared(tmp_path: Path, tiny_model_dir: Path) -> tuple[Hospital, SigningKey]:
    """A site that believes two coordinators, and the second one's key."""
    hospital = make_hospital(tmp_path / "north", tiny_model_dir)
    second = SigningKey.generate()
    keys = [hospital.coordinator.public_hex, second.public_hex]
    edited(hospital.folder, coordinator={"public-key": keys})
    return hospital, second


def _ask(hospital: Hospital, task: Task, key: SigningKey) -> Reply:
    answer = hospital.open().answer(hospital.seal(task, key))
    own = SigningKey.load(hospital.folder / "keys" / "signing.pem")
    return open_reply(answer, task=task, site="north", public_hex=own.public_hex)


def test_another_believed_coordinator_cannot_overtake_a_run(
    shared: tuple[Hospital, SigningKey],
) -> None:
    hospital, second = shared
    first = hospital.coordinator
    assert _ask(hospital, hospital.task(1), first).error_code == ""

    describe = replace(hospital.task(), kind="describe", site="", server_round=0)
    for stolen in (hospital.task(3), hospital.task(1), describe):
        assert _ask(hospital, stolen, second).error_code == "policy"

    assert _ask(hospital, hospital.task(2), first).error_code == ""
    assert _ask(hospital, hospital.task(1, run_uid="run-2"), second).error_code == ""
    assert [row.run_uid for row in hospital.open().ledger.rows("notes")] == [
        "run-1", "run-1", "run-2",
    ]  # fmt: skip


def test_what_was_refused_makes_no_run_anybodys(shared: tuple[Hospital, SigningKey]) -> None:
    hospital, second = shared
    above = hospital.task(1, settings={"lora.rank": 65})
    assert _ask(hospital, above, second).error_code == "policy"

    assert _ask(hospital, hospital.task(1), hospital.coordinator).error_code == ""


def test_a_coordinator_whose_plan_is_too_dear_takes_no_run(
    shared: tuple[Hospital, SigningKey],
) -> None:
    hospital, second = shared
    dear = hospital.task(1, settings={"privacy.noise-multiplier": 0.3})
    edited(hospital.folder, policy={"max-epsilon": 1.0})
    assert _ask(hospital, dear, second).error_code == "budget"
    assert not (hospital.folder / "state" / "run-owners" / "run-1").exists()

    edited(hospital.folder, policy={"max-epsilon": 10.0})
    assert _ask(hospital, hospital.task(1), hospital.coordinator).error_code == ""
    assert _ask(hospital, hospital.task(2), second).error_code == "policy"


def test_what_a_refused_coordinator_once_left_is_replaced(
    shared: tuple[Hospital, SigningKey],
) -> None:
    """Before the charge came first, a file was written for tasks that the ledger then refused."""
    hospital, second = shared
    left = hospital.folder / "state" / "run-owners" / "run-1"
    left.parent.mkdir(parents=True)
    left.write_text(second.public_hex)

    assert _ask(hospital, hospital.task(1), hospital.coordinator).error_code == ""

    assert left.read_text() == hospital.coordinator.public_hex
    assert _ask(hospital, hospital.task(2), second).error_code == "policy"


def test_a_run_that_is_charged_on_another_data_set_is_begun_all_the_same(
    shared: tuple[Hospital, SigningKey],
) -> None:
    hospital, second = shared
    assert _ask(hospital, hospital.task(1), hospital.coordinator).error_code == ""
    edited(hospital.folder, data={"name": "newer-notes"})

    assert _ask(hospital, hospital.task(1), second).error_code == "policy"


def test_a_charged_run_without_a_file_is_whose_task_comes_first(
    shared: tuple[Hospital, SigningKey],
) -> None:
    hospital, second = shared
    assert _ask(hospital, hospital.task(1), hospital.coordinator).error_code == ""
    (hospital.folder / "state" / "run-owners" / "run-1").unlink()

    assert _ask(hospital, hospital.task(2), second).error_code == ""
    assert _ask(hospital, hospital.task(3), hospital.coordinator).error_code == "policy"
