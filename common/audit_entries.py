"""The lines of an audit log: how one is written, read back, and found not to continue its chain.

A line is the canonical JSON of its number, time, event, fields, the digest of the line before and its
own. Each is checked byte for byte against the only way it can be spelt.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.canonical import canonical_json, from_canonical
from common.chain import ChainHead, link
from common.errors import AuditError, ProtocolError

# What to do about a log that does not hold.
KEEP_AS_EVIDENCE = "keep the file as evidence and compare it with a backup"


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One line. number: 1 up. at: Unix seconds by the writer's clock, which nothing relies on.

    salt: 32 random hex digits. A log's head leaves its owner, and whoever knows all of a line but a count
    or a name in it could otherwise try them until the head fits.
    """

    number: int
    at: int
    event: str
    fields: Mapping[str, Any]
    previous: str
    salt: str
    digest: str

    @property
    def head(self) -> ChainHead:
        """The chain's head while this was its last line."""
        return ChainHead(self.number, self.digest)

    @property
    def head_before(self) -> ChainHead:
        """The chain's head that this line was added to."""
        return ChainHead(self.number - 1, self.previous)


def next_line(head: ChainHead, event: str, fields: Mapping[str, Any]) -> bytes:
    """Return the line, without line end, of the event that follows `head` now.

    Raises ProtocolError when a field has no canonical form.
    """
    content = {
        "number": head.count + 1,
        "at": int(time.time()),
        "event": event,
        "fields": fields,
        "previous": head.digest,
        "salt": secrets.token_hex(16),
    }
    return canonical_json({**content, "digest": link(head, canonical_json(content)).digest})


def parse_line(line: bytes) -> AuditEntry:
    """Return the entry in a line. Raises AuditError when it is none, or was edited."""
    try:
        content = from_canonical(line)
        if not isinstance(content, dict) or canonical_json(content) != line:
            raise ValueError("form")
        digest = content.pop("digest", None)
        entry = AuditEntry(**content, digest=digest)
        typed = (
            (entry.number, int), (entry.at, int), (entry.event, str), (entry.fields, dict),
            (entry.salt, str),
        )  # fmt: skip
        if not all(type(value) is kind for value, kind in typed):
            raise ValueError("types")
        linked = link(entry.head_before, canonical_json(content))
    except (ValueError, TypeError, OverflowError, RecursionError, ProtocolError):
        raise AuditError("edited: it is not an entry in canonical form") from None
    if linked.digest != digest:
        raise AuditError("edited: its content is not what its digest was made of")
    return entry


def read_chain(lines: Sequence[bytes], *, after: ChainHead, path: Path) -> Iterator[AuditEntry]:
    """Yield the entries of lines that continue a chain at `after`.

    path: for words only. Raises AuditError, naming line and reason, at the first that does not.
    """
    head = after
    for index, line in enumerate(lines):
        number = head.count + 1
        try:
            entry = parse_line(line)
            if entry.number != number:
                raise AuditError(_misplaced(entry, number, lines[:index], lines[index + 1 :]))
            if entry.previous != head.digest:
                raise AuditError("does not continue the line before it: one of them was replaced")
        except AuditError as error:
            raise AuditError(f"{path}, line {number}: {error}; {KEEP_AS_EVIDENCE}") from None
        yield entry
        head = entry.head


def split_lines(data: bytes) -> tuple[list[bytes], bytes]:
    """Return the whole lines of a file, without line ends, and what comes after the last of them."""
    *lines, torn = data.split(b"\n")
    return lines, torn


def _misplaced(
    entry: AuditEntry, expected: int, before: Sequence[bytes], later: Sequence[bytes]
) -> str:
    """Say why a whole, unedited entry is not the one that was expected here."""
    if entry.number < expected:
        again = any(found.digest == entry.digest for found in _readable(before))
        how = "duplicated" if again else "inserted before it, or put in another's place"
        return f"entry {entry.number} stands here a second time: a line was {how}"
    if any(found.number == expected for found in _readable(later)):
        return f"swapped: this is entry {entry.number}, and entry {expected} comes later"
    return f"dropped: this is entry {entry.number}, and entry {expected} is missing"


def _readable(lines: Sequence[bytes]) -> Iterator[AuditEntry]:
    for line in lines:
        try:
            yield parse_line(line)
        except AuditError:
            continue
