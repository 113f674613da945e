"""A folder signed in the OpenSSF model-signing form, and everything that is not as it was signed.

model.sig is a Sigstore bundle: a DSSE envelope around an in-toto statement that names every file with its
SHA-256. The model-signing package makes and checks it with a plain key; nothing here asks a network. What it
passes over is looked at here: files named like git's, empty folders, and the spelling of model.sig itself.
Source: OpenSSF Model Signing specification 1.0; in-toto Statement v1; DSSE 1.0.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import InvalidSignature

from common.errors import ConfigError, ReleaseError
from server.export.folder import file_sha256, files_below
from server.release.key import load_release_key, public_pem

SIGNATURE = "model.sig"
# Of a model.sig, which has some 150 for each file: whoever sends one must not fill the memory with it.
_MOST_BYTES = 1 << 26

Change = Literal["changed", "added", "removed", "renamed", "not a plain file", "empty folder"]


@dataclass(frozen=True, slots=True, order=True)
class Difference:
    """One path of a folder that is not as it was signed. before: its name when it was signed, if renamed."""

    path: str
    change: Change
    before: str = ""


@dataclass(frozen=True, slots=True)
class Verified:
    """What a check found; the folder is whole when `differences` is empty. files: how many were signed."""

    files: int
    differences: tuple[Difference, ...]


def sign_folder(folder: Path, *, key: Path) -> None:
    """Write model.sig, which covers every file of a folder. Raises ConfigError as `load_release_key`."""
    load_release_key(key)
    library = require_model_signing()
    library.signing.Config().use_elliptic_key_signer(private_key=key).set_hashing_config(
        _hashing(library)
    ).sign(folder, folder / SIGNATURE)
    content = json.loads((folder / SIGNATURE).read_text(encoding="utf-8"))
    (folder / SIGNATURE).write_text(_spelled(content), encoding="utf-8")


def verify_folder(folder: Path, *, key: Path) -> Verified:
    """Compare a folder with what was signed.

    key: release.pub, which is not in the folder. Raises ReleaseError when model.sig is missing, altered or by
    another key, or the folder cannot be read, ConfigError when `key` is none.
    """
    believed = public_pem(key)
    library = require_model_signing()
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give that of a release")
    # A link to a release is no link in it.
    folder = folder.resolve()
    if key.resolve().is_relative_to(folder):
        raise ConfigError(
            f"{key} came with what it is to check: whoever changed that could have changed the key; give the "
            "release.pub that you have by another way"
        )
    signed = _check_form(folder / SIGNATURE)
    hashing = _hashing(library)
    seen = _SeenHashing(hashing)
    content_fails = False
    with tempfile.NamedTemporaryFile(suffix=".pub") as public:
        public.write(believed)
        public.flush()
        verifier = library.verifying.Config().use_elliptic_key_verifier(
            public_key=Path(public.name)
        )
        try:
            verifier.set_hashing_config(seen).verify(folder, folder / SIGNATURE)
        except (InvalidSignature, ValueError, KeyError, TypeError, OSError):
            if not seen.reached:
                raise ReleaseError(
                    f"{folder / SIGNATURE} was not made by the key in {key}, or was changed since; get the "
                    "release again, and the key by another way"
                ) from None
            content_fails = True
    # The signature holds, so the list is what the key's owner signed.
    try:
        differences = tuple(_differences(folder, signed, contents=content_fails))
    except OSError as error:
        raise ReleaseError(
            f"{folder} cannot be read whole ({error}); let the user who checks it read all of it, or get the "
            "release again"
        ) from None
    if content_fails and not differences:
        raise ReleaseError(
            f"{folder} is not what was signed, or changed while it was read; look again"
        )
    return Verified(len(signed), differences)


class _SeenHashing:
    """The library's hashing, which it asks for only after a signature held."""

    def __init__(self, hashing: Any) -> None:
        self._hashing = hashing
        self.reached = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hashing, name)

    def hash(self, *arguments: Any, **options: Any) -> Any:
        """Hash as the library does."""
        self.reached = True
        return self._hashing.hash(*arguments, **options)


def _hashing(library: Any) -> Any:
    """All files by SHA-256 but model.sig itself; links are refused."""
    return library.hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _differences(
    folder: Path, signed: Mapping[str, str], *, contents: bool
) -> Iterator[Difference]:
    """contents: whether some file's content is known to differ, so that all are read."""
    there = files_below(folder) - {SIGNATURE}
    plain = {name for name in there if stat.S_ISREG(os.lstat(folder / name).st_mode)}
    for name in there - plain:
        yield Difference(name, "not a plain file")
    for name in _empty_folders(folder):
        yield Difference(name, "empty folder")
    removed = set(signed) - there
    added = {name: file_sha256(folder / name) for name in sorted(plain - set(signed))}
    for name, digest in added.items():
        before = next((old for old in sorted(removed) if signed[old] == digest), "")
        if before:
            removed.discard(before)
        yield Difference(name, "renamed" if before else "added", before)
    for name in removed:
        yield Difference(name, "removed")
    for name in sorted(plain & set(signed)) if contents else ():
        if file_sha256(folder / name) != signed[name]:
            yield Difference(name, "changed")


def _empty_folders(folder: Path) -> set[str]:
    return {
        Path(root).relative_to(folder).as_posix()
        for root, folders, files in os.walk(folder)
        if not folders and not files and Path(root) != folder
    }


def _check_form(path: Path) -> dict[str, str]:
    """Return the files that a model.sig names, with their SHA-256; whether it holds is another question.

    Raises ReleaseError for anything but the one spelling that `sign_folder` writes: a signature covers its
    payload alone, and any change of a release is to be found.
    """
    try:
        # Reading a pipe would wait for ever.
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            raise ValueError("not a plain file, or too long")
        text = path.read_bytes().decode("utf-8")
        content = json.loads(text)
        envelope, material = content["dsseEnvelope"], content["verificationMaterial"]
        [signature] = envelope["signatures"]
        exact = [
            set(content) == {"mediaType", "verificationMaterial", "dsseEnvelope"},
            set(material) == {"publicKey", "tlogEntries"} and material["tlogEntries"] == [],
            # Without it the library only warns.
            set(material["publicKey"]) == {"hint"} and bool(material["publicKey"]["hint"]),
            set(envelope) == {"payload", "payloadType", "signatures"},
            set(signature) == {"sig", "keyid"} and signature["keyid"] == "",
            _spelled(content) == text,
        ]
        payload = base64.b64decode(envelope["payload"], validate=True)
        for coded in (envelope["payload"], signature["sig"]):
            exact.append(base64.b64encode(base64.b64decode(coded, validate=True)).decode() == coded)
        predicate = json.loads(payload)["predicate"]
        exact.append(predicate["serialization"]["hash_type"] == "sha256")
        files = {str(one["name"]): str(one["digest"]) for one in predicate["resources"]}
    except FileNotFoundError:
        raise ReleaseError(
            f"{path.parent} has no {SIGNATURE}: it is no release, or its signature was removed"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        exact, files = [False], {}
    if not all(exact):
        raise ReleaseError(
            f"{path} is not a signature in the form that a release has; it was changed: get the release again"
        )
    return files


def _spelled(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))


def require_model_signing() -> Any:
    """Return the model-signing package. Raises ConfigError when it is not installed: only this needs it."""
    try:
        return importlib.import_module("model_signing")
    except ImportError:
        raise ConfigError(
            "releases are signed and checked by the package model-signing, which is not installed: "
            "pip install 'consilium[release]'"
        ) from None
