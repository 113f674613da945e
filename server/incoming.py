"""Where accepted updates lie until they are merged: on disk, so that no round holds them all in memory.

They are for one merge of one process and nobody else: what is found there later was left by a process that
died, and its sites are asked for the same once more.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from common.adapter import AdapterShape
from common.adapter_file import AdapterFile, write_adapter_file
from server.screening import AcceptedUpdate


@contextmanager
def incoming_folder(path: Path) -> Iterator[Path]:
    """Lend an empty folder of this process's own; whatever happens, nothing of it stays."""
    _remove(path)
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        # How the run ended matters more.
        shutil.rmtree(path, ignore_errors=True)


def empty_incoming(path: Path) -> None:
    """Remove every update from the folder."""
    for file in path.iterdir():
        file.unlink()


def keep_update(
    update: AcceptedUpdate, *, folder: Path, task_sha256: str, shape: AdapterShape
) -> AcceptedUpdate:
    """Return an update whose adapter lies in the folder.

    task_sha256: of the task that it answers; no two updates have the same. shape: of the adapter.
    Raises OSError, leaving nothing half-written, when the disk is full.
    """
    adapter = update.adapter
    file = write_adapter_file(
        folder / f"{task_sha256}.safetensors",
        ((module, adapter.pair(module)) for module in adapter.modules),
        shape=shape,
        # One site's update says more of its records than a merge does.
        mode=0o600,
        fsync=False,
    )
    return replace(update, adapter=file)


def drop_update(update: AcceptedUpdate) -> None:
    """Remove an update that will not be merged."""
    if isinstance(update.adapter, AdapterFile):
        update.adapter.path.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
