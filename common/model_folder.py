"""A base model's folder: find it, and prove which model it is. No torch, nothing is loaded.

The digest covers every file that a model is read from, by name and content: config, tokenizer and
safetensors. Two folders with the same digest are the same model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from common.config import ModelSection
from common.digest_list import DigestList, FileDigest, compare_digests
from common.errors import ModelError, SignatureError

_DIGESTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


def resolve_model(section: ModelSection, *, known: Mapping[str, Path], hub: bool = False) -> Path:
    """Return the folder of a base model.

    known: names that the caller maps to folders (site.toml, a launch file); they come first.
    hub: whether a name that is no folder may be looked up on the Hugging Face hub.
    Raises ModelError when there is no such folder, or it is not a usable model.
    """
    name = section.name
    if name in known:
        folder = known[name]
    elif Path(name).is_dir():
        folder = Path(name)
    elif hub and not Path(name).is_absolute():
        folder = _from_hub(name, section.revision)
    else:
        raise ModelError(
            f"model.name = {name!r} is neither a folder nor one of {sorted(known)}; "
            "give the path of a folder with config.json, tokenizer.json and *.safetensors"
        )
    check_model_folder(folder)
    return folder.resolve()


def check_model_folder(folder: Path) -> None:
    """Raise ModelError when a folder lacks what a base model needs."""
    missing = [
        what
        for what, found in (
            ("config.json", (folder / "config.json").is_file()),
            ("*.safetensors", any(folder.glob("*.safetensors"))),
            ("tokenizer files", any(folder.glob("tokenizer*"))),
        )
        if not found
    ]
    if missing:
        hint = ""
        if "*.safetensors" in missing and any(folder.glob("*.bin")):
            hint = "; it holds pickled *.bin weights, which are never loaded: convert them first"
        raise ModelError(f"model folder {folder} lacks {', '.join(missing)}{hint}")
    _check_shards(folder)


def _check_shards(folder: Path) -> None:
    """Every weight must be in a file of this folder: the digest covers no other."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index} is not an index of safetensors shards") from None
    outside = sorted(s for s in shards if Path(s).name != s or not (folder / s).is_file())
    if outside:
        raise ModelError(f"{index} names {outside[0]!r}, which is not a file of {folder}")


def is_digested(name: str) -> bool:
    """Whether the digest of a folder covers a file of this name."""
    return any(fnmatchcase(name, pattern) for pattern in _DIGESTED)


def digest_files(folder: Path) -> DigestList:
    """Return the SHA-256 of every config, tokenizer and safetensors file of a folder, usable or not."""
    files = []
    for name in sorted(path.name for path in folder.glob("*") if is_digested(path.name)):
        stat = (folder / name).stat()
        files.append(FileDigest(name, _file_sha256(folder / name, stat.st_size, stat.st_mtime_ns)))
    return DigestList(tuple(files))


def digest_model(folder: Path) -> str:
    """Return SHA-256 hex over sorted (file name, SHA-256) of config, tokenizer and safetensors files.

    Raises ModelError when the folder is not a usable model.
    """
    check_model_folder(folder)
    return digest_files(folder).total


def check_digest_list(folder: Path, expected: DigestList) -> None:
    """Raise SignatureError, naming every file, when a folder is not what a list describes."""
    differences = compare_digests(expected, digest_files(folder))
    if differences:
        raise SignatureError(
            f"{folder} is not the model of digest {expected.total[:16]}...: {differences.sentence()}; "
            "copy what is named again, and remove what is not on the list"
        )


def check_digest(folder: Path, expected: str) -> str:
    """Return a model folder's digest, which is the expected one. Raises SignatureError, ModelError."""
    digest = digest_model(folder)
    if digest != expected:
        raise SignatureError(
            f"base model {folder} has digest {digest[:16]}..., expected {expected[:16]}...; "
            "copy the coordinator's model folder again"
        )
    return digest


def _from_hub(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_DIGESTED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model.name = {name!r} is no folder here, and the hub gave no such model "
            f"({type(error).__name__}); give the path of a local model folder"
        ) from None


@lru_cache(maxsize=64)
def _file_sha256(path: Path, size_bytes: int, modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
