"""Whoever sends what nobody signed fills the log slowly, and is counted."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from client.refusals import MAX_LINES, Refusals
from common.audit_log import AuditEntry, AuditLog, verify_audit_log
from common.errors import ProtocolError, SignatureError
from common.signing import SigningKey
from tests.unit.fake_federation import FakeClock
from tests.unit.hospital import make_hospital

ERROR = SignatureError("the signature does not hold")


class _Door:
    """A log of refusals under a clock that never waits."""

    def __init__(self, folder: Path) -> None:
        self.key = SigningKey.generate()
        self.audit, self.clock = AuditLog(folder / "audit.jsonl", self.key), FakeClock()
        self.refusals = Refusals(self.audit, clock=self.clock.monotonic)

    def knock(self, times: int) -> None:
        for number in range(times):
            self.refusals.note(b"%d" % number, ERROR)

    def lines(self) -> list[AuditEntry]:
        if not self.audit.path.exists():
            return []
        return [entry for entry in self.audit.entries() if entry.event == "refused"]

    def counts(self) -> list[int]:
        return [entry.fields["count"] for entry in self.lines() if "count" in entry.fields]


@pytest.fixture
def door(tmp_path: Path) -> _Door:
    return _Door(tmp_path)


def test_sixty_in_a_minute_have_a_line_each_as_ever(door: _Door) -> None:
    door.knock(MAX_LINES)

    assert MAX_LINES == 60
    assert len(door.lines()) == 60
    assert dict(door.lines()[7].fields) == {
        "task_sha256": hashlib.sha256(b"7").hexdigest(),
        "code": "signature",
        "why": "the signature does not hold",
    }
    door.clock.sleep(60.0)
    door.refusals.close_minute()
    assert len(door.lines()) == 60, "nobody was left out, so nothing is to be counted"


def test_beyond_them_one_line_counts_the_rest_when_the_minute_is_over(door: _Door) -> None:
    door.knock(1000)
    door.clock.sleep(59.0)
    door.knock(5)
    door.refusals.close_minute()
    assert (len(door.lines()), door.counts()) == (60, [])

    door.clock.sleep(1.0)
    door.refusals.close_minute()
    door.refusals.close_minute()

    assert (len(door.lines()), door.counts()) == (61, [945])
    assert dict(door.lines()[-1].fields) == {
        "code": "signature",
        "why": "945 tasks more within a minute that no believed coordinator signed",
        "count": 945,
    }
    assert verify_audit_log(door.audit.path, public_hex=door.key.public_hex).lines >= 61


def test_or_with_the_next_line_that_is_written(door: _Door) -> None:
    door.knock(61)
    door.clock.sleep(1000.0)
    door.knock(1)

    counted = [("count" in entry.fields) for entry in door.lines()]
    assert counted == [False] * 60 + [True, False]


def test_every_minute_has_sixty_lines_again(door: _Door) -> None:
    for _ in range(3):
        door.knock(70)
        door.clock.sleep(60.0)
    door.refusals.close_minute()

    assert (len(door.lines()), door.counts()) == (3 * 61, [10, 10, 10])


def test_an_agent_that_ends_leaves_no_count_behind(door: _Door) -> None:
    door.knock(62)
    door.refusals.close_minute(at_once=True)
    assert door.counts() == [2]
    door.refusals.close_minute(at_once=True)
    assert door.counts() == [2]


def test_a_count_that_cannot_be_written_is_kept(
    door: _Door, caplog: pytest.LogCaptureFixture
) -> None:
    door.knock(63)
    whole = door.audit.path.read_bytes()
    door.audit.path.write_bytes(whole[:100])

    door.refusals.close_minute(at_once=True)

    assert "lines were cut off" in caplog.text
    door.audit.path.write_bytes(whole)
    door.refusals.close_minute(at_once=True)
    assert door.counts() == [3]


def test_what_a_believed_coordinator_signed_has_its_line_beyond_them(door: _Door) -> None:
    door.knock(70)
    for _ in range(3):
        door.refusals.note(b"signed", ProtocolError("the task is for site 'oslo'"))
    door.knock(5)
    door.refusals.close_minute(at_once=True)

    codes = [entry.fields["code"] for entry in door.lines()]
    assert codes == ["signature"] * 60 + ["protocol"] * 3 + ["signature"]
    assert door.counts() == [15]


def test_nor_does_it_take_the_line_of_one_that_nobody_signed(door: _Door) -> None:
    for _ in range(100):
        door.refusals.note(b"signed", ProtocolError("the task is for site 'oslo'"))
    door.knock(60)

    assert (len(door.lines()), door.counts()) == (160, [])


def test_a_task_for_another_site_is_seen_through_any_rubbish(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    hospital = make_hospital(tmp_path / "north", tiny_model_dir)
    site = hospital.open()
    forged = hospital.seal(hospital.task(), SigningKey.generate())
    for _ in range(MAX_LINES + 1):
        with pytest.raises(SignatureError, match="does not hold"):
            site.admit(forged)
    for changes, said in (({"site": "oslo"}, "for site 'oslo'"), ({"protocol": 0}, "protocol")):
        with pytest.raises(ProtocolError, match=said):
            site.admit(hospital.seal(hospital.task(**changes)))

    refused = [entry.fields for entry in site.audit.entries() if entry.event == "refused"]
    assert [r["code"] for r in refused] == ["signature"] * MAX_LINES + ["protocol"] * 2


def test_a_sites_own_door_is_guarded_so(tmp_path: Path, tiny_model_dir: Path) -> None:
    hospital = make_hospital(tmp_path / "north", tiny_model_dir)
    site, clock = hospital.open(), FakeClock()
    site.refusals = Refusals(site.audit, clock=clock.monotonic)
    forged = hospital.seal(hospital.task(), SigningKey.generate())
    for _ in range(64):
        with pytest.raises(SignatureError, match="does not hold"):
            site.admit(forged)
    clock.sleep(60.0)

    site.admit(hospital.seal(hospital.task()))

    refused = [entry.fields for entry in site.audit.entries() if entry.event == "refused"]
    assert (len(refused), refused[-1].get("count")) == (61, 4)
