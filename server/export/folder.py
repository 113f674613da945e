"""Where an export goes: a new folder beside its place, which it takes when all has gone well.

export.json in it is the mark of our own work: with --force nothing else is ever replaced.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from common.errors import CheckpointError, ConfigError, DiskError
from common.files import fsync_folder, is_disk_full, write_atomically
from common.locks import hold_lock, lock_holder

MARKER = "export.json"
_FORM = "consilium-export/1"
# In the hidden folder where an export is made.
_LOCK = "lock"
_REPLACED = "replaced"


@contextmanager
def placing(target: Path, *, within: Path | None, force: bool) -> Iterator[Path]:
    """Lend an empty folder that takes the place of `target` when the block ends well, and is gone else.

    within: the run's folder, where the user named no place of their own; no link leads out of it.
    Raises as `check_place`, ConfigError where nothing can be written, and DiskError when the disk is full.
    """
    check_place(target, within=within, force=force)
    with _place_in_words(target):
        new = [folder for folder in target.parents if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        if _tidy(target):
            check_place(target, within=within, force=force)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        with hold_lock(temporary / _LOCK):
            # Of the same name: a signature names the folder that it was made in.
            made = temporary / target.name
            made.mkdir()
            yield made
            # Something may have come there meanwhile: the work took a while.
            check_place(target, within=within, force=force)
            _flush(made)
            replaced = temporary / _REPLACED
            try:
                if target.exists():
                    os.rename(target, replaced)
                os.rename(made, target)
            except BaseException:
                # Ctrl-C may come after either.
                if replaced.exists() and not target.exists():
                    os.rename(replaced, target)
                raise
            fsync_folder(target.parent)
    except Exception as error:
        if not _says_disk_full(error):
            raise
        raise DiskError(
            f"the disk of {target.parent} is full ({error}); free some space, or choose another --out"
        ) from error
    finally:
        _remove(temporary, target)
        with suppress(OSError):
            for folder in new:
                # Only what is empty goes, from the innermost on.
                folder.rmdir()


@contextmanager
def _place_in_words(target: Path) -> Iterator[None]:
    """Say in words that a place cannot be looked at, or nothing be written beside it."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise DiskError(
                f"the disk of {target.parent} is full ({error}); free some space, or choose another --out"
            ) from error
        raise ConfigError(
            f"{target} cannot be written ({error.strerror}); choose another --out"
        ) from None


def _says_disk_full(error: Exception) -> bool:
    """Also in the words of the library that writes models, whose error has no number of its own."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    return is_disk_full(error) or (
        isinstance(error, SafetensorError)
        and any(f"(os error {number})" in str(error) for number in numbers)
    )


def _tidy(target: Path) -> bool:
    """Remove what exports to this place left behind when they were killed; say whether there was any.

    What one of them was about to replace comes back. Their lock tells them from one that goes.
    """
    found = False
    for left in target.parent.glob(f".{glob.escape(target.name)}-*"):
        lock = left / _LOCK
        if not _is_ours(left, target) or lock_holder(lock) is not None:
            continue
        found = True
        replaced = left / _REPLACED
        if replaced.is_dir() and not target.exists():
            # It was killed in the moment between the two renames.
            os.rename(replaced, target)
        _remove(left, target)
    return found


def _is_ours(left: Path, target: Path) -> bool:
    """Whether an export to `target` made this hidden folder: not one to a longer name, nor a person."""
    drawn = left.name.removeprefix(f".{target.name}-")
    return (
        re.fullmatch("[a-z0-9_]{8}", drawn) is not None
        and not left.is_symlink()
        and (left / _LOCK).is_file()
        and {path.name for path in left.iterdir()} <= {_LOCK, _REPLACED, target.name}
    )


def _remove(temporary: Path, target: Path) -> None:
    """Remove a hidden folder, its lock last: whoever is killed meanwhile leaves what can be told for ours."""
    for name in (_REPLACED, target.name):
        shutil.rmtree(temporary / name, ignore_errors=True)
    shutil.rmtree(temporary, ignore_errors=True)


def check_place(target: Path, *, within: Path | None, force: bool) -> None:
    """Raise ConfigError for a folder that leads out of the run's, CheckpointError for one that is in use.

    Also ConfigError for one that may not be looked at.
    """
    with _place_in_words(target):
        _check_place(target, within=within, force=force)


def _check_place(target: Path, *, within: Path | None, force: bool) -> None:
    if within is not None:
        expected = within.resolve() / target.relative_to(within)
        if target.resolve() != expected:
            raise ConfigError(
                f"{target} leads out of {within}, to {target.resolve()}; remove that link, or name the place "
                "with --out"
            )
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(f"{target} is not a folder; move it away, or choose another --out")
    if not target.exists() or not any(target.iterdir()):
        return
    own = _own_files(target)
    if own is None:
        raise CheckpointError(
            f"{target} holds files, and no export of ours wrote them; choose another --out"
        )
    if not force:
        raise CheckpointError(
            f"{target} holds an export already; replace it with --force, or choose another --out"
        )
    foreign = sorted(files_below(target) - own)
    if foreign:
        raise CheckpointError(
            f"{target} holds {foreign[0]!r}, which no export wrote; move it away, or choose another --out"
        )


def files_below(folder: Path) -> set[str]:
    """Return the paths of everything below a folder that is no plain folder itself, links not followed."""
    found: set[str] = set()
    for root, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        found |= {(Path(root) / name).relative_to(folder).as_posix() for name in (*files, *links)}
    return found


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_marker(folder: Path, content: Mapping[str, Any], *, later: frozenset[str]) -> None:
    """Write export.json: what is said of an export, and its files with their SHA-256.

    later: names of files that are still to come, which have none.
    """
    files = {
        name: file_sha256(folder / name) for name in sorted(files_below(folder)) if name != MARKER
    }
    named = {**content, "files": {**files, **dict.fromkeys(sorted(later - set(files)))}}
    text = json.dumps({"form": _FORM, **named}, indent=2) + "\n"
    write_atomically(folder / MARKER, text.encode())


def _own_files(folder: Path) -> frozenset[str] | None:
    """The files that an export wrote here, None where no export has."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return frozenset({MARKER, *marker["files"]}) if marker["form"] == _FORM else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _flush(folder: Path) -> None:
    """Make what libraries wrote durable, and readable to whoever may read its folder."""
    os.chmod(folder, 0o755)
    for name in files_below(folder):
        os.chmod(folder / name, 0o644)
        descriptor = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    fsync_folder(folder)


def _raise(error: OSError) -> None:
    raise error
