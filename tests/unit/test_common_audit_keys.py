"""A log whose key changes: the key of today vouches for all of it, and nobody else can change it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.audit_entries import next_line, parse_line
from common.audit_keys import KEY_CHANGED, key_change
from common.audit_log import AuditLog, read_audit_log, verify_audit_log
from common.chain import EMPTY, ChainHead
from common.errors import AuditError
from common.signing import SigningKey

FIRST, SECOND, THIRD, STRANGER = (SigningKey.generate() for _ in range(4))
LOST = ChainHead(500, "ab" * 32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log of three keys, with checkpoints and a settlement of each."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, FIRST, checkpoint_every=4)
    for new in (SECOND, THIRD, None):
        for number in range(6):
            log.append("sent", round=number)
        log.settle(audit=LOST, ledger=LOST)
        if new is not None:
            log.change_key(new)
    return path


def test_the_key_of_today_vouches_for_the_whole_log(path: Path) -> None:
    verified = verify_audit_log(path, public_hex=THIRD.public_hex, checkpoint_every=4)
    assert verified.checkpoints >= 3
    assert verified.lines == len(list(read_audit_log(path)))
    for former in (FIRST, SECOND):
        with pytest.raises(AuditError, match="to which it was changed, not of"):
            verify_audit_log(path, public_hex=former.public_hex, checkpoint_every=4)


def test_a_process_with_the_key_of_today_goes_on_and_one_with_a_former_key_writes_nothing(
    path: Path,
) -> None:
    before = path.read_bytes()
    for former in (FIRST, SECOND):
        stale = AuditLog(path, former)
        assert stale.covers(LOST)
        with pytest.raises(AuditError, match=r"was changed to .*and this process has"):
            stale.append("sent", round=9)
        with pytest.raises(AuditError, match="was changed to"):
            stale.change_key(STRANGER)
    assert path.read_bytes() == before
    log = AuditLog(path, THIRD, checkpoint_every=4)
    log.append("sent", round=9)
    verify_audit_log(path, public_hex=THIRD.public_hex, checkpoint_every=4)


def test_a_process_that_had_the_log_open_stops_when_the_key_changes(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    warm, other = AuditLog(path, FIRST), AuditLog(path, FIRST)
    warm.append("sent", round=1)
    other.change_key(SECOND)
    with pytest.raises(AuditError, match="end it and start it again"):
        warm.append("sent", round=2)
    other.append("sent", round=3)
    assert verify_audit_log(path, public_hex=SECOND.public_hex).lines == 3


def test_a_history_put_in_front_of_todays_key_is_found(path: Path) -> None:
    """Its maker signs it with a key of his own, and has that key sign over to today's."""
    head, lines = EMPTY, []

    def add(event: str, fields: dict[str, Any]) -> None:
        nonlocal head
        lines.append(next_line(head, event, fields))
        head = parse_line(lines[-1]).head

    add("sent", {"round": 1})
    forged = key_change(head, former=STRANGER, new=STRANGER)
    add(KEY_CHANGED, {**forged, "to": THIRD.public_hex})
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    with pytest.raises(AuditError, match="line 2: changes the log's key, and not both keys signed"):
        verify_audit_log(path, public_hex=THIRD.public_hex)
    with pytest.raises(AuditError, match="not both keys signed"):
        AuditLog(path, THIRD).append("sent")


def test_a_true_change_does_not_hold_in_another_place(path: Path) -> None:
    """Both signed it, after other lines than these."""
    change = next(entry for entry in read_audit_log(path) if entry.event == KEY_CHANGED)
    first = next_line(EMPTY, "sent", {"round": 1})
    second = next_line(parse_line(first).head, KEY_CHANGED, change.fields)
    path.write_bytes(first + b"\n" + second + b"\n")
    with pytest.raises(AuditError, match="not both keys signed that"):
        verify_audit_log(path, public_hex=SECOND.public_hex)


def test_nobody_takes_a_log_over_with_a_key_of_his_own(path: Path) -> None:
    *_, last = read_audit_log(path)
    forged = {**key_change(last.head, former=STRANGER, new=STRANGER), "from": THIRD.public_hex}
    with path.open("ab") as file:
        file.write(next_line(last.head, KEY_CHANGED, forged) + b"\n")
    for key in (THIRD, STRANGER):
        with pytest.raises(AuditError, match="not both keys signed that"):
            verify_audit_log(path, public_hex=key.public_hex, checkpoint_every=4)
