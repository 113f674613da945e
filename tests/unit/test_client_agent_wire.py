"""An envelope in pieces: what goes in comes out, and nothing else is taken."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.agent_pb2 import Opening, Piece
from client.agent_wire import PIECE_BYTES, in_pieces, take_adapter, take_opening
from common.errors import ProtocolError
from common.records import Envelope

PROJECT = Path(__file__).resolve().parents[2]


def _back(pieces: Iterator[Piece]) -> Envelope:
    opening = take_opening(pieces)
    adapter = io.BytesIO()
    take_adapter(pieces, opening, write=adapter.write)
    return Envelope(opening.payload, opening.signature, adapter.getvalue())


@given(
    payload=st.binary(max_size=40),
    signature=st.binary(max_size=64),
    size=st.sampled_from([0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES]),
)
def test_an_envelope_comes_out_as_it_went_in(payload: bytes, signature: bytes, size: int) -> None:
    envelope = Envelope(payload, signature, bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    assert _back(iter(list(in_pieces(envelope)))) == envelope


def test_no_piece_is_larger_than_what_one_is_said_to_be() -> None:
    pieces = list(in_pieces(Envelope(b"p", b"s", memoryview(bytes(5 * PIECE_BYTES + 3)))))
    assert [len(piece.adapter) for piece in pieces] == [0, *[PIECE_BYTES] * 5, 3]


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ([], "did not begin with an opening"),
        ([Piece(adapter=b"x")], "did not begin with an opening"),
        ([Piece(opening=Opening(protocol=2))], "speaks version 2, this one 1"),
        (
            [Piece(opening=Opening(protocol=1, adapter_bytes=2)), Piece(adapter=b"x")],
            "brought 1 of 2 adapter bytes",
        ),
        (
            [Piece(opening=Opening(protocol=1, adapter_bytes=1)), Piece(adapter=b"xy")],
            "more than was announced",
        ),
        (
            [Piece(opening=Opening(protocol=1)), Piece(opening=Opening(protocol=1))],
            "more than was announced",
        ),
    ],
)
def test_what_is_no_envelope_is_refused_in_words(pieces: list[Piece], why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        _back(iter(pieces))


def test_the_generated_code_is_that_of_the_proto_file(tmp_path: Path) -> None:
    """After a change of client/agent.proto: make proto."""
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "-I."),
            *(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", "client/agent.proto"),
        ],
        cwd=PROJECT,
        check=True,
    )
    for name in ("agent_pb2.py", "agent_pb2.pyi"):
        assert (tmp_path / "client" / name).read_text() == (PROJECT / "client" / name).read_text()
