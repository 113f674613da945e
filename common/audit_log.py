"""A tamper-evident log: one JSON line for each event, chained by SHA-256, signed at checkpoints.

Every edited, dropped, added or reordered line breaks the chain. Who can write the file could make the
chain anew from there on, but not the Ed25519 checkpoints in it; who has the key as well is caught by an
anchor: a head that the other side keeps, because it came in a signed message. Lines after the last
checkpoint and the last anchor are as safe as the file itself.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from common.audit_entries import (
    KEEP_AS_EVIDENCE,
    AuditEntry,
    next_line,
    parse_line,
    read_chain,
    split_lines,
)
from common.audit_keys import KEY_CHANGED, first_signer, key_change, signer_after
from common.canonical import canonical_json
from common.chain import EMPTY, ChainHead
from common.errors import AuditError, SignatureError
from common.files import fsync_folder
from common.signing import AUDIT_DOMAIN, SigningKey, verify

__all__ = ["AuditEntry", "AuditLog", "Verified", "read_audit_log", "verify_audit_log"]

# Fewer lines between two signatures leave an intruder less to rewrite; each costs a line.
CHECKPOINT_EVERY = 32

_CHECKPOINT = "checkpoint"
_TORN = "torn"
_SETTLED = "settled"
# Lines whose signature covers all that stands before them.
_SIGNED = (_CHECKPOINT, KEY_CHANGED)
# A line's fields, or what makes them of the head before it.
_Fields = Mapping[str, Any] | Callable[[ChainHead], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Verified:
    """A log that holds.

    unsigned: lines after the last checkpoint. anchors: how many were found as they were anchored;
    settled: how many are not in this log, and a line of it says so (it was restored from a backup).
    """

    lines: int
    checkpoints: int
    unsigned: int
    head: ChainHead
    anchors: int
    settled: int


class AuditLog:
    """A log that this process may append to; others may at the same time.

    key: signs the checkpoints. watch: is told every line once, those found at the first use included;
    it must not use the log itself.
    Every method raises AuditError when the file is not the chain that it was, and writes nothing then.
    """

    def __init__(
        self,
        path: Path,
        key: SigningKey,
        *,
        checkpoint_every: int = CHECKPOINT_EVERY,
        watch: Callable[[AuditEntry], None] = lambda entry: None,
    ) -> None:
        self.path = path
        self._key = key
        self._checkpoint_every = checkpoint_every
        self._watch = watch
        # What was read so far, whole lines only: no call reads a line twice.
        self._size_bytes = 0
        self._head = EMPTY
        self._digests = bytearray()
        self._settled: set[ChainHead] = set()
        self._settled_ledgers: set[ChainHead] = set()
        self._unsigned = 0
        # Whose signatures the next lines must have; None until the file was read.
        self._signer: str | None = None

    def append(self, event: str, **fields: Any) -> ChainHead:
        """Write one event durably, a checkpoint after it when one is due, and return the new head.

        fields: JSON scalars, lists and mappings; no text of records. Raises ProtocolError for others.
        """
        with self._locked(create=True) as file:
            torn_bytes = self._refresh(file)
            self._write(file, [*_torn(torn_bytes), (event, fields)])
            return self._head

    def checkpoint(self) -> ChainHead:
        """Sign what stands so far, unless the last line did so, and return the head."""
        with self._locked(create=True) as file:
            torn_bytes = self._refresh(file)
            if self._unsigned or torn_bytes:
                self._write(file, _torn(torn_bytes), sign=True)
            return self._head

    def head(self) -> ChainHead:
        """Return where the log stands, lines of other processes counted in."""
        with self._locked() as file:
            self._refresh(file)
            return self._head

    def change_key(self, new: SigningKey) -> ChainHead:
        """Let another key sign from here on, which both keys sign, and return the head."""
        with self._locked(create=True) as file:
            torn_bytes = self._refresh(file)
            change = partial(key_change, former=self._key, new=new)
            self._write(file, [*_torn(torn_bytes), (KEY_CHANGED, change)], sign=False)
            self._key = new
            return self._head

    def covers(self, head: ChainHead) -> bool:
        """Say whether this log has been at `head`, or `settle` accepted that it has not."""
        with self._locked() as file:
            self._refresh(file)
            if head == EMPTY or head in self._settled:
                return True
            if not 0 < head.count <= self._head.count:
                return False
            return self._digests[32 * (head.count - 1) : 32 * head.count].hex() == head.digest

    def settle(self, *, audit: ChainHead, ledger: ChainHead) -> ChainHead:
        """Accept, signed, that this log and the ledger beside it lost what these heads stood for.

        The signature is the line's own: whoever can write both files cannot settle without the key.
        """
        lost = {"audit": asdict(audit), "ledger": asdict(ledger)}
        signature = self._key.sign(canonical_json({_SETTLED: lost}), domain=AUDIT_DOMAIN)
        return self.append(_SETTLED, **lost, signature=signature.hex())

    def settled_ledger(self, head: ChainHead) -> bool:
        """Say whether `settle` accepted this head of the ledger as lost."""
        with self._locked() as file:
            self._refresh(file)
            return head in self._settled_ledgers

    def entries(self) -> Iterator[AuditEntry]:
        """Yield every line, oldest first."""
        return read_audit_log(self.path)

    @contextmanager
    def _locked(self, *, create: bool = False) -> Iterator[BinaryIO | None]:
        """The file, ours alone among all threads and processes; None when there is none."""
        if create:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        try:
            descriptor = os.open(self.path, flags, 0o600)
        except FileNotFoundError:
            yield None
            return
        with os.fdopen(descriptor, "r+b") as file:
            # A lock belongs to the opened file, so two threads of a process exclude each other too.
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _refresh(self, file: BinaryIO | None) -> int:
        """Take in the lines that are new to this process; return the bytes of a torn last one."""
        size_bytes = 0 if file is None else os.fstat(file.fileno()).st_size
        if size_bytes < self._size_bytes:
            raise AuditError(
                f"{self.path} has {size_bytes} bytes, and had {self._size_bytes} when this process last "
                f"read it: lines were cut off; {KEEP_AS_EVIDENCE}"
            )
        if file is None or size_bytes == self._size_bytes:
            return 0
        file.seek(self._size_bytes)
        lines, torn = split_lines(file.read())
        entries = list(read_chain(lines, after=self._head, path=self.path))
        if self._signer is None:
            self._signer = first_signer(entries, public_hex=self._key.public_hex)
        for line, entry in zip(lines, entries, strict=True):
            self._take_in(entry, line)
        return len(torn)

    def _write(
        self, file: BinaryIO | None, events: list[tuple[str, _Fields]], *, sign: bool | None = None
    ) -> None:
        """Write lines, and a checkpoint after them: when it is due, or as `sign` says."""
        assert file is not None
        if self._signer not in (None, self._key.public_hex):
            raise AuditError(
                f"the key of {self.path} was changed to {str(self._signer)[:16]}..., and this process has "
                f"{self._key.public_hex[:16]}...; end it and start it again, or finish what changes the key "
                "(consilium client rotate --finish)"
            )
        head, written = self._head, []
        due = self._unsigned + len(events) >= self._checkpoint_every
        if due if sign is None else sign:
            events = [*events, (_CHECKPOINT, self._signature)]
        for event, fields in events:
            line = next_line(head, event, fields(head) if callable(fields) else fields)
            # As everybody will read it, so that nothing is written that nobody can.
            written.append((parse_line(line), line))
            head = written[-1][0].head
        # A torn line is overwritten, and cut off last: at no moment is it gone without a word.
        file.seek(self._size_bytes)
        file.write(b"".join(line + b"\n" for _, line in written))
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
        if self._size_bytes == 0:
            fsync_folder(self.path.parent)
        for entry, line in written:
            self._take_in(entry, line)

    def _signature(self, head: ChainHead) -> dict[str, str]:
        signature = self._key.sign(canonical_json(asdict(head)), domain=AUDIT_DOMAIN)
        return {"key": self._key.public_hex, "signature": signature.hex()}

    def _take_in(self, entry: AuditEntry, line: bytes) -> None:
        self._size_bytes += len(line) + 1
        self._head = entry.head
        self._digests += bytes.fromhex(entry.digest)
        self._unsigned = 0 if entry.event in _SIGNED else self._unsigned + 1
        signer = self._signer or self._key.public_hex
        lost = _settled(entry, public_hex=signer, path=self.path)
        self._signer = signer_after(entry, signer, path=self.path)
        if lost is not None:
            self._settled.add(lost[0])
            self._settled_ledgers.add(lost[1])
        self._watch(entry)


def read_audit_log(path: Path) -> Iterator[AuditEntry]:
    """Yield every whole line of a log, oldest first. Raises AuditError at the first that is not one.

    Chain and canonical form are checked on the way, signatures are not.
    """
    lines, _ = split_lines(_read(path))
    return read_chain(lines, after=EMPTY, path=path)


def verify_audit_log(
    path: Path,
    *,
    public_hex: str,
    anchors: Iterable[ChainHead] = (),
    checkpoint_every: int = CHECKPOINT_EVERY,
) -> Verified:
    """Check a whole log: every line, every signature, every anchor.

    public_hex: whose log it is now; the log itself says, signed, which keys it had before. anchors: heads
    that others were sent in signed messages.
    Raises AuditError naming the first bad line and what is wrong with it.
    """
    lines, torn = split_lines(_read(path))
    digests: list[str] = []
    settled: set[ChainHead] = set()
    checkpoints, last_signed = 0, 0
    entries = list(read_chain(lines, after=EMPTY, path=path))
    signer = first_signer(entries, public_hex=public_hex)
    for entry in entries:
        if entry.event == _CHECKPOINT:
            _check_signature(entry, public_hex=signer, path=path)
            checkpoints, last_signed = checkpoints + 1, entry.number
        elif entry.event == KEY_CHANGED:
            last_signed = entry.number
        # Twice, because each crash may leave a line and cost the checkpoint after it.
        elif entry.number - last_signed > 2 * checkpoint_every:
            raise AuditError(
                f"{path}, line {entry.number}: no checkpoint since line {last_signed}, and one is due "
                f"every {checkpoint_every} lines: the chain was made anew; {KEEP_AS_EVIDENCE}"
            )
        digests.append(entry.digest)
        lost = _settled(entry, public_hex=signer, path=path)
        if lost is not None:
            settled.add(lost[0])
        signer = signer_after(entry, signer, path=path)
    if signer != public_hex:
        raise AuditError(
            f"{path} is the log of key {signer[:16]}..., to which it was changed, not of "
            f"{public_hex[:16]}...; name that key, or finish what changes it (consilium client rotate "
            "--finish)"
        )
    if torn:
        raise AuditError(
            f"{path}, line {len(lines) + 1}: torn, {len(torn)} bytes without a line end; the next "
            "event that is logged takes their place and says so"
        )
    wanted = set(anchors) - {EMPTY}
    for anchor in sorted(wanted - settled, key=lambda anchor: anchor.count):
        _check_anchor(anchor, digests, path=path)
    return Verified(
        lines=len(digests),
        checkpoints=checkpoints,
        unsigned=len(digests) - last_signed,
        head=ChainHead(len(digests), digests[-1]) if digests else EMPTY,
        anchors=len(wanted - settled),
        settled=len(wanted & settled),
    )


def _check_signature(entry: AuditEntry, *, public_hex: str, path: Path) -> None:
    key, signature = entry.fields.get("key"), entry.fields.get("signature")
    if key != public_hex:
        raise AuditError(
            f"{path}, line {entry.number}: the checkpoint is signed by another key "
            f"({str(key)[:16]}..., not {public_hex[:16]}...); {KEEP_AS_EVIDENCE}"
        )
    try:
        verify(
            canonical_json(asdict(entry.head_before)),
            bytes.fromhex(str(signature)),
            domain=AUDIT_DOMAIN,
            public_hex=public_hex,
        )
    except (SignatureError, ValueError):
        raise AuditError(
            f"{path}, line {entry.number}: the checkpoint's signature does not hold: a line before it "
            f"was changed and the chain made anew, without the key; {KEEP_AS_EVIDENCE}"
        ) from None


def _check_anchor(anchor: ChainHead, digests: list[str], *, path: Path) -> None:
    if anchor.count > len(digests):
        raise AuditError(
            f"{path} ends at line {len(digests)}, and line {anchor.count} was anchored: the end was cut "
            f"off; {KEEP_AS_EVIDENCE}"
        )
    if anchor.count < 1 or digests[anchor.count - 1] != anchor.digest:
        raise AuditError(
            f"{path}, line {anchor.count}: not the line that was anchored: it was changed and the chain "
            f"made anew; {KEEP_AS_EVIDENCE}"
        )


def _settled(
    entry: AuditEntry, *, public_hex: str, path: Path
) -> tuple[ChainHead, ChainHead] | None:
    """The heads of log and ledger that a `settled` line accepts as lost, None for any other line.

    Raises AuditError when that line is not signed by the log's own key.
    """
    if entry.event != _SETTLED:
        return None
    try:
        lost = {name: dict(entry.fields[name]) for name in ("audit", "ledger")}
        verify(
            canonical_json({_SETTLED: lost}),
            bytes.fromhex(entry.fields["signature"]),
            domain=AUDIT_DOMAIN,
            public_hex=public_hex,
        )
        return ChainHead(**lost["audit"]), ChainHead(**lost["ledger"])
    except (SignatureError, ValueError, TypeError, KeyError):
        raise AuditError(
            f"{path}, line {entry.number}: a settlement that this log's key did not sign; "
            f"{KEEP_AS_EVIDENCE}"
        ) from None


def _torn(size_bytes: int) -> list[tuple[str, _Fields]]:
    return [(_TORN, {"bytes": size_bytes})] if size_bytes else []


def _read(path: Path) -> bytes:
    """The file's bytes while nobody is writing."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            return file.read()
    except FileNotFoundError:
        raise AuditError(f"there is no audit log at {path}; correct the path") from None
