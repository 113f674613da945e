"""Durable writes: a file is either the old one or the whole new one, also after a power cut."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

# Bytes in memory, or a view of a file that is mapped.
Buffer = bytes | memoryview

_DISK_IS_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def write_atomically(path: Path, content: Buffer, *, mode: int = 0o644) -> None:
    """Write `content` to `path` by temporary file, fsync, rename and fsync of the folder.

    mode: permission bits of the new file, never wider than this even for a moment.
    Raises OSError, leaving no partial file behind, when the disk is full or the folder missing.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames and removals inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or a user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in _DISK_IS_FULL
