"""The audit log: whatever is done to its lines shows, and what a crash leaves is said."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import secrets
import stat
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from common.audit_entries import next_line, parse_line, read_chain, split_lines
from common.audit_log import AuditEntry, AuditLog, read_audit_log, verify_audit_log
from common.canonical import canonical_json, from_canonical
from common.chain import EMPTY, ChainHead, link
from common.errors import AuditError, ProtocolError
from common.signing import AUDIT_DOMAIN, SigningKey

KEY = SigningKey.generate()
LINES = 200
# A checkpoint follows every 32 lines: it is line 33, 66, ..., 198.
CHECKPOINTS = 6

# The log read hundreds of times: coverage's tracer makes that more than twice as long, and finds no line
# that one change of each kind has not.
untraced = pytest.mark.no_cover


def _write_log(path: Path, *, lines: int = LINES) -> list[bytes]:
    """Write a log of so many lines, much like a coordinator's; return them without line ends."""
    log = AuditLog(path, KEY)
    number = 0
    while log.head().count < lines:
        number += 1
        log.append(
            "reply",
            site=("oslo", "bern")[number % 2],
            round=number,
            heads={"audit": {"count": number, "digest": "ab" * 32}},
            numbers={"steps": 3, "train-loss": 1.5},
            stopped=None,
        )
    return path.read_bytes().splitlines()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return _write_log(tmp_path_factory.mktemp("pristine") / "audit.jsonl")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def _head(lines: Sequence[bytes], count: int) -> ChainHead:
    return parse_line(lines[count - 1]).head if count else EMPTY


def _verify(path: Path, lines: Sequence[bytes], **options: Any) -> Any:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return verify_audit_log(path, public_hex=KEY.public_hex, **options)


def _rechained(lines: Sequence[bytes], *, start: int, key: SigningKey | None = None) -> list[bytes]:
    """Return lines made to follow each other from `start` (0 up), as one who may write would.

    key: signs the checkpoints again; without it they stay as they are.
    """
    made = list(lines[:start])
    for line in lines[start:]:
        old, head = parse_line(line), _head(made, len(made))
        fields = dict(old.fields)
        if old.event == "checkpoint" and key is not None:
            signature = key.sign(canonical_json(asdict(head)), domain=AUDIT_DOMAIN)
            fields = {"key": key.public_hex, "signature": signature.hex()}
        made.append(next_line(head, old.event, fields))
    return made


# What it says of a log that nobody touched


def test_an_untouched_log_holds(path: Path, pristine: list[bytes]) -> None:
    anchors = [_head(pristine, count) for count in (0, 1, 150, LINES, LINES)]
    verified = _verify(path, pristine, anchors=anchors)
    assert (verified.lines, verified.checkpoints, verified.unsigned) == (LINES, CHECKPOINTS, 2)
    assert verified.head == _head(pristine, LINES)
    # 0 is no anchor, and one told twice is one.
    assert (verified.anchors, verified.settled) == (3, 0)


def test_an_empty_log_holds_and_a_missing_one_is_an_error(path: Path) -> None:
    with pytest.raises(AuditError, match="there is no audit log at"):
        verify_audit_log(path, public_hex=KEY.public_hex)
    assert _verify(path, []).head == EMPTY


def test_a_checkpoint_comes_after_every_so_many_lines(pristine: list[bytes]) -> None:
    events = [parse_line(line).event for line in pristine]
    numbers = [number for number, event in enumerate(events, start=1) if event == "checkpoint"]
    assert numbers == [33, 66, 99, 132, 165, 198]


# What its head gives away


def test_every_line_has_128_random_bits_of_its_own(pristine: list[bytes]) -> None:
    """Those that people log, and the checkpoints between them."""
    salts = [parse_line(line).salt for line in pristine]

    assert all(re.fullmatch("[0-9a-f]{32}", salt) for salt in salts)
    assert len(set(salts)) == LINES


def test_a_count_in_a_line_cannot_be_found_by_trying_it_against_the_head(path: Path) -> None:
    """The head leaves the site, and all of a refusal's line but a true count is easy to guess."""
    log = AuditLog(path, KEY)
    log.append("task", run="run-1")
    before = log.head()
    log.append("refused", code="data", why="7 of 12 records have no answer")
    line: dict[str, Any] = from_canonical(path.read_bytes().splitlines()[-1])
    digest = line.pop("digest")
    salt = line.pop("salt")

    guesses = [line, {**line, "salt": ""}, {**line, "salt": secrets.token_hex(16)}]

    assert (
        digest == log.head().digest == link(before, canonical_json({**line, "salt": salt})).digest
    )
    assert digest not in [link(before, canonical_json(guess)).digest for guess in guesses]


def test_two_logs_of_the_same_events_have_different_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.audit_entries.time.time", lambda: 1_700_000_000)
    logs = [AuditLog(tmp_path / name, KEY) for name in ("a", "b")]

    heads = [log.append("refused", code="data", why="7 of 12 records") for log in logs]

    assert len({head.digest for head in heads}) == 2
    assert [head.count for head in heads] == [1, 1]


# Whatever is done to its lines


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda lines: [*lines[:99], *lines[100:]], "line 100: dropped"),
        (lambda lines: [*lines[:99], lines[100], lines[99], *lines[101:]], "line 100: swapped"),
        (lambda lines: [*lines[:100], lines[99], *lines[100:]], "line 101: .* duplicated"),
        (lambda lines: [*lines[:100], _added(lines, 100), *lines[100:]], "line 102: .* inserted"),
        (lambda lines: [*lines[:99], _added(lines, 99), *lines[100:]], "line 101: does not"),
        (lambda lines: [*lines[:99], lines[99][:-2], *lines[100:]], "line 100: edited"),
    ],
)
def test_one_change_of_each_kind_is_named(
    path: Path, pristine: list[bytes], change: Any, why: str
) -> None:
    with pytest.raises(AuditError, match=why):
        _verify(path, change(pristine))


def _added(lines: Sequence[bytes], number: int) -> bytes:
    """A line that follows perfectly the first `number` lines."""
    return next_line(_head(lines, number), "reply", {"site": "kiel"})


@untraced
def test_every_flipped_bit_in_any_byte_is_found(pristine: list[bytes]) -> None:
    """Every byte of the file, line ends included, one bit of each drawn by seed.

    A reader that has come to a line judges it by that line and the one after it alone (a flipped line
    end joins the two), so each flip is read from there; the next test reads whole files.
    """
    draw = random.Random(7)
    tried = 0
    for index, line in enumerate(pristine):
        head = _head(pristine, index)
        after = pristine[index + 1] + b"\n" if index + 1 < len(pristine) else b""
        clean = line + b"\n" + after
        for position in range(len(line) + 1):
            flipped = bytearray(clean)
            flipped[position] ^= 1 << draw.randrange(8)
            tried += 1
            lines, torn = split_lines(bytes(flipped))
            try:
                list(read_chain(lines, after=head, path=Path("audit.jsonl")))
            except AuditError:
                continue
            assert torn, f"line {index + 1}, byte {position}: not found"
    assert tried == sum(len(line) + 1 for line in pristine) > 40_000


@untraced
def test_a_flipped_bit_is_found_in_the_whole_file_and_its_line_is_named(
    path: Path, pristine: list[bytes]
) -> None:
    draw = random.Random(8)
    for number in range(1, LINES + 1):
        flipped = bytearray(pristine[number - 1])
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(7)
        lines = [*pristine[: number - 1], bytes(flipped), *pristine[number:]]
        with pytest.raises(AuditError, match=rf"line {number}: edited"):
            _verify(path, lines)


@pytest.mark.parametrize(
    "spelling",
    [
        lambda line: line.replace(b'":', b'": ', 1),
        lambda line: line + b" ",
        lambda line: b"\xef\xbb\xbf" + line,
        lambda line: line.replace(b'"at"', b'"\\u0061t"'),
        lambda line: line.replace(b"1.8", b"1.80"),
        lambda line: line.decode().encode("utf-16"),
        lambda line: line[:-1] + b',"number":17}',
        lambda line: b"[" * 100_000,
        lambda line: b'{"number":' + b"9" * 5000 + b"}",
    ],
)
def test_another_spelling_of_the_very_same_entry_is_found(
    path: Path, pristine: list[bytes], spelling: Any
) -> None:
    changed = spelling(pristine[16])
    assert changed != pristine[16]
    with pytest.raises(AuditError, match="line 17: edited: it is not an entry in canonical form"):
        _verify(path, [*pristine[:16], changed, *pristine[17:]])


def test_an_entry_of_other_types_is_none_though_its_digest_holds(
    path: Path, pristine: list[bytes]
) -> None:
    """From one who writes lines of his own making, not from a flipped bit."""
    head = _head(pristine, 3)
    good: dict[str, Any] = {
        "number": 4, "at": 1, "event": "reply", "fields": {}, "previous": head.digest,
        "salt": "00" * 16,
    }  # fmt: skip
    for changes in ({}, {"at": "1"}, {"at": True}, {"event": None}, {"salt": 1}, {"more": 1}):
        content = {**good, **changes}
        digest = link(head, canonical_json(content)).digest
        lines = [*pristine[:3], canonical_json({**content, "digest": digest})]
        if not changes:
            assert _verify(path, lines).lines == 4
            continue
        with pytest.raises(AuditError, match="line 4: edited: it is not an entry"):
            _verify(path, lines)


@untraced
def test_every_dropped_line_is_found(path: Path, pristine: list[bytes]) -> None:
    for number in range(1, LINES):
        lines = [*pristine[: number - 1], *pristine[number:]]
        with pytest.raises(
            AuditError, match=rf"line {number}: dropped: this is entry {number + 1}"
        ):
            _verify(path, lines)


@untraced
def test_every_swap_of_two_neighbours_is_found(path: Path, pristine: list[bytes]) -> None:
    for number in range(1, LINES):
        lines = list(pristine)
        lines[number - 1], lines[number] = lines[number], lines[number - 1]
        with pytest.raises(
            AuditError, match=rf"line {number}: swapped: this is entry {number + 1}"
        ):
            _verify(path, lines)


@untraced
def test_lines_that_change_places_from_afar_are_found(path: Path, pristine: list[bytes]) -> None:
    draw = random.Random(9)
    for _ in range(50):
        first, second = sorted(draw.sample(range(LINES), 2))
        lines = list(pristine)
        lines[first], lines[second] = lines[second], lines[first]
        with pytest.raises(AuditError, match=rf"line {first + 1}: swapped: .* {second + 1}, and"):
            _verify(path, lines)


@untraced
def test_every_duplicated_line_is_found(path: Path, pristine: list[bytes]) -> None:
    for number in range(1, LINES + 1):
        lines = [*pristine[:number], pristine[number - 1], *pristine[number:]]
        with pytest.raises(AuditError, match=rf"line {number + 1}: entry {number} .* duplicated"):
            _verify(path, lines)


@untraced
def test_every_line_put_in_between_is_found(path: Path, pristine: list[bytes]) -> None:
    """One that follows what is before it perfectly."""
    for number in range(1, LINES):
        added = next_line(_head(pristine, number), "reply", {"site": "kiel"})
        with pytest.raises(AuditError, match=rf"line {number + 2}: entry {number + 1} .* inserted"):
            _verify(path, [*pristine[:number], added, *pristine[number:]])


@untraced
def test_a_line_in_anothers_place_is_found(path: Path, pristine: list[bytes]) -> None:
    for number in range(1, LINES):
        other = next_line(_head(pristine, number - 1), "reply", {"site": "kiel"})
        lines = [*pristine[: number - 1], other, *pristine[number:]]
        with pytest.raises(AuditError, match=rf"line {number + 1}: does not continue"):
            _verify(path, lines)


def test_every_truncation_past_an_anchor_is_found(path: Path, pristine: list[bytes]) -> None:
    anchor = _head(pristine, 150)
    for count in range(150):
        with pytest.raises(AuditError, match=rf"ends at line {count}, and line 150 was anchored"):
            _verify(path, pristine[:count], anchors=[EMPTY, anchor])
    # Beyond the anchor nobody outside knows of a line.
    assert _verify(path, pristine[:150], anchors=[anchor]).anchors == 1


def test_a_cut_within_a_line_is_named_as_torn(path: Path, pristine: list[bytes]) -> None:
    for size in (1, 40, len(pristine[-1])):
        path.write_bytes(b"\n".join([*pristine[:-1], pristine[-1][:size]]))
        with pytest.raises(AuditError, match=rf"line {LINES}: torn, {size} bytes"):
            verify_audit_log(path, public_hex=KEY.public_hex)


def _edited(lines: Sequence[bytes], number: int) -> list[bytes]:
    """Return the lines with the site of one entry changed, and that entry's own digest with it."""
    old = parse_line(lines[number - 1])
    new = next_line(old.head_before, old.event, {**old.fields, "site": "kiel"})
    return [*lines[: number - 1], new, *lines[number:]]


@pytest.mark.parametrize(("number", "found_at"), [(1, 33), (32, 33), (34, 66), (150, 165)])
def test_a_chain_made_anew_without_the_key_is_found_at_the_next_checkpoint(
    path: Path, pristine: list[bytes], number: int, found_at: int
) -> None:
    lines = _rechained(_edited(pristine, number), start=number)
    assert parse_line(lines[-1]).number == LINES
    with pytest.raises(AuditError, match=rf"line {found_at}: the checkpoint's signature does not"):
        _verify(path, lines)


def test_a_chain_signed_anew_by_another_key_is_found(path: Path, pristine: list[bytes]) -> None:
    lines = _rechained(_edited(pristine, 5), start=5, key=SigningKey.generate())
    with pytest.raises(AuditError, match="line 33: the checkpoint is signed by another key"):
        _verify(path, lines)


def test_another_keys_signature_under_our_keys_name_is_found(
    path: Path, pristine: list[bytes]
) -> None:
    lines = _rechained(pristine, start=0, key=SigningKey.generate())
    forged = parse_line(lines[32])
    fields = {**forged.fields, "key": KEY.public_hex}
    lines[32] = next_line(forged.head_before, "checkpoint", fields)
    with pytest.raises(AuditError, match="line 33: the checkpoint's signature does not hold"):
        _verify(path, _rechained(lines, start=33))


def test_a_signature_that_is_none_is_found(path: Path, pristine: list[bytes]) -> None:
    old = parse_line(pristine[32])
    bad = next_line(old.head_before, "checkpoint", {"key": KEY.public_hex, "signature": "?"})
    with pytest.raises(AuditError, match="line 33: the checkpoint's signature does not hold"):
        _verify(path, _rechained([*pristine[:32], bad, *pristine[33:]], start=33))


def test_a_chain_made_anew_without_its_checkpoints_is_found(
    path: Path, pristine: list[bytes]
) -> None:
    entries = [parse_line(line) for line in _edited(pristine, 40)]
    kept = [e for e in entries if e.event != "checkpoint" or e.number < 40]
    lines = list(pristine[:33])
    for entry in kept[33:]:
        lines.append(next_line(_head(lines, len(lines)), entry.event, entry.fields))
    with pytest.raises(AuditError, match="line 98: no checkpoint since line 33"):
        _verify(path, lines)


@pytest.mark.parametrize("number", [1, 149, 150])
def test_a_chain_made_anew_even_with_the_key_is_found_by_an_anchor(
    path: Path, pristine: list[bytes], number: int
) -> None:
    lines = _rechained(_edited(pristine, number), start=number, key=KEY)
    # Nothing in the file itself tells.
    assert _verify(path, lines).checkpoints == CHECKPOINTS
    with pytest.raises(AuditError, match="line 150: not the line that was anchored"):
        _verify(path, lines, anchors=[_head(pristine, 150)])


def test_an_anchor_that_no_log_could_have_is_not_taken(path: Path, pristine: list[bytes]) -> None:
    last = _head(pristine, LINES).digest
    for anchor in (ChainHead(0, "ab" * 32), ChainHead(0, last), ChainHead(-1, last)):
        with pytest.raises(AuditError, match="not the line that was anchored"):
            _verify(path, pristine, anchors=[anchor])


# Writing


def test_entries_come_back_as_they_were_written(path: Path) -> None:
    log = AuditLog(path, KEY)
    fields: dict[str, Any] = {
        "site": "Zürich",
        "epsilon": float("inf"),
        "numbers": MappingProxyType({"train-loss": 0.1}),
        "sites": ("bern", "oslo"),
        "none": None,
        "ok": True,
    }
    first = log.append("reply", **fields)
    second = log.append("finished")
    one, two = log.entries()
    assert (one.number, one.event, one.head) == (1, "reply", first)
    assert one.fields == {**fields, "numbers": {"train-loss": 0.1}, "sites": ["bern", "oslo"]}
    assert (two.number, dict(two.fields), two.head, two.previous) == (2, {}, second, first.digest)
    assert two.head_before == first


def test_what_has_no_canonical_form_is_not_written(path: Path) -> None:
    log = AuditLog(path, KEY)
    log.append("run-started")
    before = path.read_bytes()
    for value in (object(), b"bytes", "\ud800", {"float": 1.0}, {1: 2}):
        with pytest.raises(ProtocolError, match="form|mapping"):
            log.append("reply", value=value)
    assert path.read_bytes() == before
    assert log.append("finished").count == 2


def test_the_file_is_the_owners_alone_and_durable_with_its_folder(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    log = AuditLog(path.parent / "new" / "audit.jsonl", KEY)
    log.append("run-started")
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.path.parent.stat().st_mode) == 0o700
    assert synced == [str(log.path), str(log.path.parent)]
    log.append("finished")
    assert synced[2:] == [str(log.path)]


def test_a_log_that_is_only_asked_makes_no_file(path: Path) -> None:
    log = AuditLog(path, KEY)
    assert log.head() == EMPTY
    assert log.covers(EMPTY)
    assert not log.covers(ChainHead(1, "ab" * 32))
    assert not path.exists()


def test_a_checkpoint_on_demand_signs_what_stands_and_only_once(path: Path) -> None:
    log = AuditLog(path, KEY)
    assert log.checkpoint() == EMPTY
    log.append("run-started")
    signed = log.checkpoint()
    assert log.checkpoint() == signed == log.head()
    assert [entry.event for entry in log.entries()] == ["run-started", "checkpoint"]
    assert verify_audit_log(path, public_hex=KEY.public_hex).unsigned == 0


def test_the_interval_counts_from_the_last_checkpoint(path: Path) -> None:
    log = AuditLog(path, KEY, checkpoint_every=3)
    for event in "abcd":
        log.append(event)
    log.checkpoint()
    for event in "efg":
        log.append(event)
    events = [entry.event for entry in log.entries()]
    assert events == ["a", "b", "c", "checkpoint", "d", "checkpoint", "e", "f", "g", "checkpoint"]


def test_a_clock_that_goes_back_does_not_matter(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(path, KEY)
    for now_s in (2000.9, 1000.0, 0.0, 3000.0):
        monkeypatch.setattr("common.audit_entries.time.time", lambda now_s=now_s: now_s)
        log.append("tick")
    assert [entry.at for entry in log.entries()] == [2000, 1000, 0, 3000]
    assert verify_audit_log(path, public_hex=KEY.public_hex).lines == 4


def test_a_new_process_goes_on_where_the_last_one_stopped(path: Path) -> None:
    for start in range(5):
        log = AuditLog(path, KEY, checkpoint_every=3)
        assert log.append("start", number=start) == log.head()
    # Lines 3 and 7 brought a checkpoint each.
    assert [entry.event for entry in read_audit_log(path)] == [
        "start", "start", "start", "checkpoint", "start", "start",
    ]  # fmt: skip
    assert verify_audit_log(path, public_hex=KEY.public_hex, checkpoint_every=3).lines == 6


def test_a_warm_log_reads_no_line_twice_and_is_told_others_lines_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[AuditEntry] = []
    AuditLog(path, KEY).append("before")
    log, other = AuditLog(path, KEY, watch=told.append), AuditLog(path, KEY)
    read: list[int] = []

    def counted(lines: Sequence[bytes], **options: Any) -> Any:
        read.append(len(lines))
        return read_chain(lines, **options)

    monkeypatch.setattr("common.audit_log.read_chain", counted)
    log.append("mine")
    assert read == [1]
    other.append("other's")
    assert read == [1, 2]
    assert log.head() == other.head()
    assert log.head().count == 3
    assert read == [1, 2, 1]
    assert [entry.event for entry in told] == ["before", "mine", "other's"]
    assert told == list(log.entries())


# Where the log has been


def test_a_log_covers_exactly_the_heads_that_it_has_had(path: Path, pristine: list[bytes]) -> None:
    _verify(path, pristine)
    log = AuditLog(path, KEY)
    for count in range(LINES + 1):
        head = _head(pristine, count)
        assert log.covers(head)
        if count:
            assert not log.covers(replace(head, count=count + 1))
            assert not log.covers(replace(head, count=count - 1))
            assert not log.covers(replace(head, digest="00" * 32))
    for count in (-1, 0):
        assert not log.covers(ChainHead(count, _head(pristine, LINES - 1).digest))
    later = log.append("reply")
    assert log.covers(later)


def test_a_settled_line_accepts_the_head_that_a_restore_lost(
    path: Path, pristine: list[bytes]
) -> None:
    """A backup of 120 lines, and a coordinator that has seen 150."""
    lost = _head(pristine, 150)
    _verify(path, pristine[:120])
    log = AuditLog(path, KEY)
    log.append("refused")
    assert not log.covers(lost)
    ledger = ChainHead(9, "cd" * 32)
    assert not log.settled_ledger(ledger)
    log.settle(audit=lost, ledger=ledger)
    assert AuditLog(path, KEY).settled_ledger(ledger)
    for each in (log, AuditLog(path, KEY)):
        assert each.covers(lost)
        assert not each.covers(_head(pristine, 149))
    verified = verify_audit_log(
        path, public_hex=KEY.public_hex, anchors=[lost, _head(pristine, 120)]
    )
    assert (verified.anchors, verified.settled) == (1, 1)


@pytest.mark.parametrize("forgery", ["no signature", "another key", "another head"])
def test_a_settlement_that_the_logs_own_key_did_not_sign_is_found(path: Path, forgery: str) -> None:
    """Whoever can write the file, but has no key, could otherwise hide any cut behind it."""
    lost = ChainHead(150, "ab" * 32)
    writer = AuditLog(path, KEY if forgery != "another key" else SigningKey.generate())
    writer.settle(audit=lost, ledger=lost)
    (entry,) = writer.entries()
    fields: dict[str, Any] = dict(entry.fields)
    if forgery == "no signature":
        del fields["signature"]
    if forgery == "another head":
        fields["audit"] = {"count": 151, "digest": "ab" * 32}
    path.write_bytes(next_line(EMPTY, "settled", fields) + b"\n")
    with pytest.raises(AuditError, match="line 1: a settlement that this log's key did not sign"):
        AuditLog(path, KEY).covers(lost)
    with pytest.raises(AuditError, match="line 1: a settlement that this log's key did not sign"):
        verify_audit_log(path, public_hex=KEY.public_hex, anchors=[lost])


# Crashes, and files that change under it


@pytest.mark.parametrize("torn_bytes", [1, 100, 5000])
@pytest.mark.parametrize("warm", [True, False])
def test_a_torn_line_is_cut_off_by_the_next_event_and_said(
    path: Path, torn_bytes: int, warm: bool
) -> None:
    log = AuditLog(path, KEY)
    log.append("run-started")
    with path.open("ab") as file:
        file.write(b"{" * torn_bytes)
    if not warm:
        log = AuditLog(path, KEY)
    assert log.head().count == 1
    assert [entry.event for entry in log.entries()] == ["run-started"]
    log.append("resumed")
    events = [(entry.event, entry.fields.get("bytes")) for entry in log.entries()]
    assert events == [("run-started", None), ("torn", torn_bytes), ("resumed", None)]
    assert verify_audit_log(path, public_hex=KEY.public_hex).lines == 3


def test_a_checkpoint_after_a_crash_says_what_was_torn(path: Path) -> None:
    log = AuditLog(path, KEY)
    log.append("run-started")
    log.checkpoint()
    with path.open("ab") as file:
        file.write(b'{"at":1')
    log.checkpoint()
    events = [entry.event for entry in log.entries()]
    assert events == ["run-started", "checkpoint", "torn", "checkpoint"]


def test_a_log_cut_at_any_byte_by_a_crash_goes_on_and_loses_no_whole_line(path: Path) -> None:
    """What a power cut leaves of a write that held an event and its checkpoint."""
    log = AuditLog(path, KEY, checkpoint_every=2)
    log.append("first")
    kept = path.stat().st_size
    log.append("second")
    whole = path.read_bytes()
    assert whole.count(b"\n") == 3
    for size in range(kept, len(whole) + 1, 7):
        path.write_bytes(whole[:size])
        again = AuditLog(path, KEY, checkpoint_every=2)
        again.append("third")
        verified = verify_audit_log(path, public_hex=KEY.public_hex)
        events = [entry.event for entry in again.entries()]
        assert events[0] == "first"
        assert "third" in events
        assert ("torn" in events) == (not whole[:size].endswith(b"\n"))
        assert verified.unsigned < 2


def test_a_write_that_fails_is_no_event_and_the_log_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(path, KEY)
    log.append("run-started")
    told = log.head()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _disk_is_full)
        with pytest.raises(OSError, match="No space left"):
            log.append("reply")
    # It reached the file, if perhaps not the disk; it is taken in as another process's line would be.
    assert log.head().count == told.count + 1
    log.append("finished")
    assert [entry.event for entry in log.entries()] == ["run-started", "reply", "finished"]


def _disk_is_full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_log_that_shrank_while_it_was_in_use_is_not_written_to(
    path: Path, pristine: list[bytes]
) -> None:
    _verify(path, pristine)
    log = AuditLog(path, KEY)
    log.head()
    _verify(path, pristine[:-1])
    before = path.read_bytes()
    for call in (lambda: log.append("reply"), log.head, log.checkpoint, lambda: log.covers(EMPTY)):
        with pytest.raises(AuditError, match=r"audit\.jsonl has .* lines were cut off"):
            call()
    assert path.read_bytes() == before
    path.unlink()
    with pytest.raises(AuditError, match=r"has 0 bytes, and had"):
        log.head()


def test_a_log_that_was_replaced_while_it_was_in_use_is_not_written_to(
    path: Path, pristine: list[bytes]
) -> None:
    _verify(path, pristine[:50])
    log = AuditLog(path, KEY)
    log.head()
    _verify(path, _rechained(_edited(pristine, 50), start=50, key=KEY))
    before = path.read_bytes()
    with pytest.raises(AuditError, match=r"line 51: does not continue"):
        log.append("reply")
    assert path.read_bytes() == before


def test_a_damaged_log_is_neither_written_to_nor_read_past_the_damage(
    path: Path, pristine: list[bytes]
) -> None:
    damaged = [*pristine[:60], pristine[60].replace(b"reply", b"relpy"), *pristine[61:]]
    path.write_bytes(b"".join(line + b"\n" for line in damaged))
    with pytest.raises(AuditError, match=r"line 61: edited.*keep the file as evidence"):
        AuditLog(path, KEY).append("reply")
    entries = read_audit_log(path)
    assert [next(entries).number for _ in range(60)] == list(range(1, 61))
    with pytest.raises(AuditError, match="line 61: edited"):
        next(entries)
    assert path.read_bytes().count(b"\n") == LINES


# Several at once


def _append_50(path: Path, key_path: Path, name: str) -> None:
    log = AuditLog(path, SigningKey.load(key_path))
    for number in range(50):
        log.append("tick", process=name, number=number)


def test_four_processes_make_one_chain(path: Path, tmp_path: Path) -> None:
    KEY.save(tmp_path / "key.pem")
    context = multiprocessing.get_context("spawn")
    writers = [
        context.Process(target=_append_50, args=(path, tmp_path / "key.pem", name))
        for name in "abcd"
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0, 0]
    verified = verify_audit_log(path, public_hex=KEY.public_hex)
    ticks = [entry.fields for entry in read_audit_log(path) if entry.event == "tick"]
    for name in "abcd":
        assert [tick["number"] for tick in ticks if tick["process"] == name] == list(range(50))
    # One checkpoint after every 32 lines, whoever wrote them: 200 lines have 6.
    assert (verified.lines, verified.checkpoints) == (206, 6)


def test_threads_that_share_a_log_make_one_chain(path: Path) -> None:
    log = AuditLog(path, KEY)

    def write() -> None:
        for _ in range(20):
            log.append("tick")
            assert log.covers(log.head())

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verify_audit_log(path, public_hex=KEY.public_hex).lines == 82
