"""Manifests: what left, or is about to, in names, shapes, digests, bytes and numbers.

The audit log holds a manifest's SHA-256; the manifest itself is kept once beside it, since a 7B model's
adapter has 448 tensors.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from client.egress import CheckedAdapter
from common.canonical import canonical_json, from_canonical, plain_json
from common.errors import AuditError
from common.files import write_atomically
from common.records import PrivacyRow


@dataclass(frozen=True, slots=True)
class ManifestTensor:
    """One tensor of an adapter: its name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that one reply carries beside what it answers, its signature and the heads of ledger and log.

    tensors: by name, () without an adapter. adapter_digest: of all of them (common.adapter), "" without.
    adapter_bytes: of the file. numbers: by name. privacy: what the reply says of its protection.
    """

    tensors: tuple[ManifestTensor, ...]
    adapter_digest: str
    adapter_bytes: int
    numbers: tuple[tuple[str, float], ...]
    privacy: PrivacyRow | None

    def canonical(self) -> bytes:
        """Return the bytes that the digest is of, and that are kept."""
        return canonical_json(asdict(self))

    @property
    def sha256(self) -> str:
        """SHA-256 hex of the canonical form; the audit log carries it."""
        return hashlib.sha256(self.canonical()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """Return it for another program to read; infinite epsilon as None."""
        content = {**asdict(self), "numbers": dict(self.numbers), "sha256": self.sha256}
        plain: dict[str, Any] = plain_json(content)
        return plain


def manifest_of(
    adapter: CheckedAdapter | None, *, numbers: Mapping[str, float], privacy: PrivacyRow | None
) -> Manifest:
    """Return the manifest of a reply that passed client.egress. adapter: None for none."""
    tensors = {} if adapter is None else adapter.state.tensors()
    return Manifest(
        tensors=tuple(
            ManifestTensor(name, tuple(array.shape), str(array.dtype))
            for name, array in sorted(tensors.items())
        ),
        adapter_digest="" if adapter is None else adapter.state.digest(),
        adapter_bytes=0 if adapter is None else len(adapter.data),
        numbers=tuple(sorted(numbers.items())),
        privacy=privacy,
    )


class Manifests:
    """The folder of manifests, each a file named by its digest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def store(self, manifest: Manifest) -> str:
        """Keep a manifest durably and return its SHA-256; one that is there already stays."""
        path = self._folder / f"{manifest.sha256}.json"
        if not path.exists():
            write_atomically(path, manifest.canonical(), mode=0o600)
        return path.stem

    def load(self, start: str) -> Manifest:
        """Return the manifest whose SHA-256 begins with `start`.

        Raises AuditError when there is none or more than one, or when it is not what its digest was of.
        """
        hexadecimal = re.fullmatch(r"[0-9a-f]{1,64}", start) is not None
        found = list(self._folder.glob(f"{start}*.json")) if hexadecimal else []
        if len(found) != 1:
            raise AuditError(
                f"{len(found)} manifests in {self._folder} begin with {start!r}; give more of the digest "
                "that the audit log holds"
            )
        data = found[0].read_bytes()
        if hashlib.sha256(data).hexdigest() != found[0].stem:
            raise AuditError(
                f"{found[0]} was edited: its content is not what its digest was made of"
            )
        content = from_canonical(data)
        content["tensors"] = tuple(
            ManifestTensor(**{**tensor, "shape": tuple(tensor["shape"])})
            for tensor in content["tensors"]
        )
        content["numbers"] = tuple((name, value) for name, value in content["numbers"])
        if content["privacy"] is not None:
            content["privacy"] = PrivacyRow(**content["privacy"])
        return Manifest(**content)


def manifest_table(manifest: Manifest) -> Table:
    """Return what leaves as a table, tensors that differ only by numbers in their names in one row."""
    table = Table("what", "value", title="What leaves")
    groups = Counter(
        (re.sub(r"\d+", "*", tensor.name), tensor.shape, tensor.dtype)
        for tensor in manifest.tensors
    )
    for (name, shape, dtype), count in groups.items():
        tensors = "1 tensor" if count == 1 else f"{count} tensors"
        shown = f"{' x '.join(map(str, shape))}, {dtype}, {tensors}\n{name}"
        table.add_row("adapter", Text(shown, overflow="fold"))
    if manifest.tensors:
        table.add_row("adapter file", decimal(manifest.adapter_bytes))
        table.add_row("adapter digest", manifest.adapter_digest)
    for name, value in manifest.numbers:
        table.add_row(name, str(value))
    for name, value in asdict(manifest.privacy).items() if manifest.privacy is not None else ():
        table.add_row(name.replace("_", "-"), str(value))
    table.add_row("manifest", manifest.sha256)
    return table
