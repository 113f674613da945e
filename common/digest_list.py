"""Which files a base model consists of, as a list that travels with it: `sha256sum -c` reads it, too."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from common.errors import SignatureError

# `sha256sum -c` takes a line that begins with # for a comment.
_TOTAL = "# consilium model digest "
_LINE = re.compile(r"(?P<sha256>[0-9a-f]{64}) [ *](?P<name>[^/\n]+)")


@dataclass(frozen=True, slots=True, order=True)
class FileDigest:
    """One file of a model folder. sha256: 64 hex digits of its content."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class DigestList:
    """The files that a base model is read from, sorted by name."""

    files: tuple[FileDigest, ...]

    @property
    def total(self) -> str:
        """The model's digest: SHA-256 hex over each file's name and SHA-256. allowed-models holds it."""
        total = hashlib.sha256()
        for file in self.files:
            total.update(f"{file.name}\x00{file.sha256}\n".encode())
        return total.hexdigest()

    def text(self) -> str:
        """Return the list as a file: a comment with the total, then a line for each file."""
        lines = [f"{file.sha256}  {file.name}" for file in self.files]
        return "\n".join([f"{_TOTAL}{self.total}", *lines, ""])


@dataclass(frozen=True, slots=True)
class Differences:
    """What a folder has otherwise than its list says, by file name."""

    differing: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.differing or self.missing or self.extra)

    def sentence(self) -> str:
        """Name every file and what is wrong with it."""
        parts = [
            f"{what}: {', '.join(names)}"
            for what, names in (
                ("other content", self.differing),
                ("missing", self.missing),
                ("not on the list", self.extra),
            )
            if names
        ]
        return "; ".join(parts)


def parse_digest_list(text: str, *, name: str) -> DigestList:
    """Return the list that `DigestList.text` wrote. name: what errors call it.

    Raises SignatureError when a line is neither, or the total is not that of the lines.
    """
    total, files = "", []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith(_TOTAL):
            total = line.removeprefix(_TOTAL).strip()
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise SignatureError(
                f"{name} line {number} is not 64 hex digits, two spaces and a file name; "
                "write the list again with `consilium model digest PATH --write FILE`"
            )
        files.append(FileDigest(match["name"], match["sha256"]))
    found = DigestList(tuple(sorted(files)))
    if found.total != total:
        raise SignatureError(
            f"{name} says digest {total[:16] or 'nothing'} and its {len(files)} lines make "
            f"{found.total[:16]}...: it was cut or edited, so copy it again"
        )
    return found


def compare_digests(expected: DigestList, found: DigestList) -> Differences:
    """Return what `found` has otherwise than `expected`."""
    wanted = {file.name: file.sha256 for file in expected.files}
    there = {file.name: file.sha256 for file in found.files}
    return Differences(
        differing=tuple(n for n in sorted(wanted.keys() & there) if wanted[n] != there[n]),
        missing=tuple(sorted(wanted.keys() - there)),
        extra=tuple(sorted(there.keys() - wanted)),
    )
