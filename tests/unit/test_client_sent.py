"""Manifests: they say what left, are found by their digest, and cannot be changed unseen."""

from __future__ import annotations

import hashlib
import io
import json
import math
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from client.egress import CheckedAdapter
from client.sent import Manifest, Manifests, ManifestTensor, manifest_of, manifest_table
from common.errors import AuditError
from common.records import PrivacyRow
from tests.unit.adapters import random_adapter

PRIVACY = PrivacyRow("record", 2.75, 1e-5, 0.8, 1 / 3, 30)


def _manifest(seed: int = 0, *, privacy: PrivacyRow | None = PRIVACY) -> Manifest:
    state = random_adapter(seed, rank=2)
    adapter = CheckedAdapter(state.to_safetensors(), state)
    return manifest_of(adapter, numbers={"steps": 30, "train-loss": 1.5}, privacy=privacy)


def _printed(manifest: Manifest) -> str:
    text = io.StringIO()
    Console(width=100, file=text).print(manifest_table(manifest))
    return text.getvalue()


def test_a_manifest_names_every_tensor_and_holds_no_value() -> None:
    state = random_adapter(0, rank=2)
    manifest = _manifest()

    assert manifest.tensors == tuple(
        ManifestTensor(name, array.shape, "float32") for name, array in state.tensors().items()
    )
    assert manifest.adapter_digest == state.digest()
    assert manifest.adapter_bytes == len(state.to_safetensors())
    assert manifest.numbers == (("steps", 30), ("train-loss", 1.5))


def test_a_reply_without_an_adapter_has_a_manifest_too() -> None:
    manifest = manifest_of(None, numbers={"max-rank": 8}, privacy=None)

    assert (manifest.tensors, manifest.adapter_digest, manifest.adapter_bytes) == ((), "", 0)
    assert "max-rank" in _printed(manifest)


def test_the_digest_is_of_all_of_it() -> None:
    manifest = _manifest()
    others = [
        _manifest(1),
        replace(manifest, numbers=(("steps", 31),)),
        replace(manifest, privacy=replace(PRIVACY, epsilon=2.76)),
        replace(manifest, privacy=None),
        replace(manifest, tensors=manifest.tensors[1:]),
    ]

    assert manifest.sha256 == _manifest().sha256
    assert len({manifest.sha256, *(other.sha256 for other in others)}) == 6


def test_a_stored_manifest_is_found_by_the_start_of_its_digest(tmp_path: Path) -> None:
    manifests = Manifests(tmp_path / "manifests")
    unprotected = replace(PRIVACY, unit="none", epsilon=math.inf)
    for manifest in (_manifest(), _manifest(privacy=unprotected), _manifest(privacy=None)):
        sha256 = manifests.store(manifest)

        assert sha256 == manifest.sha256
        assert manifests.load(sha256) == manifest
        assert manifests.load(sha256[:12]) == manifest


def test_a_manifest_is_written_once_and_for_the_hospital_alone(tmp_path: Path) -> None:
    manifests = Manifests(tmp_path / "manifests")
    manifest = _manifest()
    path = tmp_path / "manifests" / f"{manifests.store(manifest)}.json"
    written = path.stat()
    manifests.store(manifest)

    assert path.stat().st_ino == written.st_ino
    assert stat.S_IMODE(written.st_mode) == 0o600
    assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem


def test_an_edited_manifest_is_found(tmp_path: Path) -> None:
    manifests = Manifests(tmp_path / "manifests")
    sha256 = manifests.store(_manifest())
    path = tmp_path / "manifests" / f"{sha256}.json"
    path.write_bytes(path.read_bytes().replace(b'["steps",30]', b'["steps",20]'))

    with pytest.raises(AuditError, match="was edited"):
        manifests.load(sha256)


@pytest.mark.parametrize("start", ["", "*", "../x", "00ff", "A" * 64, "0" * 65])
def test_only_one_manifest_that_is_there_is_shown(tmp_path: Path, start: str) -> None:
    manifests = Manifests(tmp_path / "manifests")
    manifests.store(_manifest())

    with pytest.raises(AuditError, match="0 manifests in"):
        manifests.load(start)


def test_a_start_that_fits_two_manifests_shows_neither(tmp_path: Path) -> None:
    manifests = Manifests(tmp_path / "manifests")
    # Among 17 digests two begin alike.
    starts = [manifests.store(_manifest(seed))[0] for seed in range(17)]
    twice = next(start for start in starts if starts.count(start) > 1)

    with pytest.raises(AuditError, match=r"[2-9] manifests in"):
        manifests.load(twice)


def test_the_table_counts_tensors_of_one_shape_together() -> None:
    state = ManifestTensor("a", (8, 64), "float32")
    many = tuple(replace(state, name=f"layer-{i:03}") for i in range(448))
    manifest = replace(_manifest(), tensors=(*many, ManifestTensor("b", (64, 8), "float32")))

    printed = _printed(manifest)

    assert "8 x 64, float32, 448 tensors" in printed
    assert "layer-*" in printed
    assert "layer-0" not in printed
    assert "64 x 8, float32, 1 tensor " in printed
    assert manifest.sha256 in printed
    assert manifest.adapter_digest in printed
    assert "2.75" in printed
    assert len(printed.splitlines()) < 25


def test_tensors_of_one_shape_and_other_names_are_shown_apart() -> None:
    """A tensor that no adapter has would otherwise hide among those of its shape."""
    names = ("a.1.q_proj", "a.2.q_proj", "a.1.records", "[red]a")
    tensors = tuple(ManifestTensor(name, (8, 64), "float32") for name in names)

    printed = _printed(replace(_manifest(), tensors=tensors))

    assert [printed.count(name) for name in ("a.*.q_proj", "a.*.records", "[red]a")] == [1, 1, 1]
    assert printed.count("8 x 64, float32, 2 tensors") == 1
    assert printed.count("8 x 64, float32, 1 tensor ") == 2


def test_json_of_a_manifest_is_strict_json() -> None:
    unprotected = _manifest(privacy=replace(PRIVACY, unit="none", epsilon=math.inf))

    content = json.loads(json.dumps(unprotected.as_json(), allow_nan=False))

    assert content["privacy"]["epsilon"] is None
    assert content["numbers"] == {"steps": 30, "train-loss": 1.5}
    assert content["sha256"] == unprotected.sha256
