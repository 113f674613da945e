"""Incoming adapters lie in a file that nobody else can find, and are gone afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from client.spool import MAX_ADAPTER_BYTES, spooled
from common.errors import DiskError, ProtocolError

Write = Callable[[bytes], object]


def _bring(*pieces: bytes) -> Callable[[Write], None]:
    def receive(write: Write) -> None:
        for piece in pieces:
            write(piece)

    return receive


def test_what_arrives_is_there_and_the_folder_shows_nothing(tmp_path: Path) -> None:
    with spooled(tmp_path, size_bytes=6, receive=_bring(b"abc", b"def")) as adapter:
        assert (bytes(adapter), len(adapter)) == (b"abcdef", 6)
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_arrays_that_look_at_it_may_outlive_it(tmp_path: Path) -> None:
    with spooled(tmp_path, size_bytes=8, receive=_bring(b"\x00" * 8)) as adapter:
        array = np.frombuffer(adapter, dtype="<f4")
    assert array.tolist() == [0.0, 0.0]


def test_no_adapter_takes_no_file(tmp_path: Path) -> None:
    with spooled(tmp_path, size_bytes=0, receive=_bring()) as adapter:
        assert adapter == b""
    with (
        pytest.raises(ProtocolError, match="1 adapter bytes came, where none were announced"),
        spooled(tmp_path, size_bytes=0, receive=_bring(b"x")),
    ):
        pass


@pytest.mark.parametrize("size_bytes", [-1, MAX_ADAPTER_BYTES + 1])
def test_a_size_that_no_adapter_has_is_refused(tmp_path: Path, size_bytes: int) -> None:
    with (
        pytest.raises(ProtocolError, match=f"an adapter of {size_bytes} bytes"),
        spooled(tmp_path, size_bytes=size_bytes, receive=_bring()),
    ):
        pass


def test_a_disk_that_cannot_hold_it_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    with (
        pytest.raises(DiskError, match="2,000,000 bytes free, and an adapter of 1,500,000"),
        spooled(tmp_path, size_bytes=1_500_000, receive=_bring()),
    ):
        pass
