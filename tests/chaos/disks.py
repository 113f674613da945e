"""A small disk that can be filled: a real tmpfs over a folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.files import is_disk_full


@contextmanager
def small_disk(folder: Path, *, size_bytes: int = 4 << 20) -> Iterator[None]:
    """Put a folder with what it holds on a small disk of its own."""
    shutil.copytree(folder, folder.with_name("copy"), symlinks=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no right to mount a tmpfs here: {mounted.stderr.strip()}")
    try:
        shutil.copytree(folder.with_name("copy"), folder, symlinks=True, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def full(folder: Path, *, leave_bytes: int) -> Iterator[None]:
    """Let a folder's disk have no more than `leave_bytes` of space, in whole pages."""
    ballast = folder / "ballast"
    descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    try:
        size = 0
        try:
            while True:
                size += os.write(descriptor, bytes(4096))
        except OSError as error:
            if not is_disk_full(error):
                raise
        os.ftruncate(descriptor, size - leave_bytes)
    finally:
        os.close(descriptor)
    yield
    ballast.unlink()
