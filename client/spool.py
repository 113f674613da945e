"""Incoming adapters: on disk while they arrive and while they are used, so that memory holds none of them."""

from __future__ import annotations

import mmap
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import DiskError, ProtocolError
from common.files import Buffer

# Above any adapter that policy.max-rank allows for a model that one machine trains: 70B at rank 64 is 6.6 GB.
MAX_ADAPTER_BYTES = 16 << 30
_SPARE_BYTES = 1 << 20


@contextmanager
def spooled(
    folder: Path, *, size_bytes: int, receive: Callable[[Callable[[bytes], object]], None]
) -> Iterator[Buffer]:
    """Give what `receive` writes as a view of a file without a name; it is gone when the block ends.

    receive: is given what to call with each piece; it brings size_bytes in all. The pages of the view are the
    system's file cache, which it takes back when it needs the memory.
    Raises ProtocolError for more than MAX_ADAPTER_BYTES, DiskError when the disk cannot hold it.
    """
    if size_bytes == 0:
        receive(_refuse)
        yield b""
        return
    if not 0 < size_bytes <= MAX_ADAPTER_BYTES:
        raise ProtocolError(
            f"an adapter of {size_bytes} bytes, where at most {MAX_ADAPTER_BYTES} are taken"
        )
    free = shutil.disk_usage(folder).free
    if free < size_bytes + _SPARE_BYTES:
        raise DiskError(
            f"{folder} has {free:,} bytes free, and an adapter of {size_bytes:,} comes; free some space, and "
            "the task goes on when it is asked again"
        )
    with tempfile.TemporaryFile(dir=folder) as file:
        receive(file.write)
        file.flush()
        # Whoever looks at it last lets go of it.
        yield memoryview(mmap.mmap(file.fileno(), size_bytes, access=mmap.ACCESS_READ))


def _refuse(piece: bytes) -> None:
    if piece:
        raise ProtocolError(f"{len(piece)} adapter bytes came, where none were announced")
