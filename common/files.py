"""Durable writes: a file is either the old one or the whole new one, also after a power cut."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# Bytes in memory, or a view of a file that is mapped.
Buffer = bytes | memoryview

_DISK_IS_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def write_atomically(path: Path, content: Buffer, *, mode: int = 0o644) -> None:
    """Write `content` to `path` by temporary file, fsync, rename and fsync of the folder.

    mode: permission bits of the new file, never wider than this even for a moment.
    Raises OSError, leaving no partial file behind, when the disk is full or the folder missing.
    """
    with replacing(path, mode=mode) as file:
        file.write(content)


@contextmanager
def replacing(path: Path, *, mode: int = 0o644, fsync: bool = True) -> Iterator[BinaryIO]:
    """Lend a new file that takes the place of `path` when the block ends well, and is gone when it does not.

    mode: as in `write_atomically`. fsync: whether it must be there after a power cut.
    Raises OSError when the disk is full or the folder missing.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), mode)
            if fsync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if fsync:
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
