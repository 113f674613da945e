"""Adapters on disk: the same bytes as in memory, read module by module, and never half-written."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.adapter import AdapterShape, AdapterState, FactorSource, LoraPair, from_safetensors
from common.adapter_file import AdapterFile, open_adapter_file, write_adapter_file
from common.errors import ProtocolError, ShapeError
from tests.unit.adapters import adapter_shape, in_memory, random_adapter

SHAPE = adapter_shape(3)
STATE = random_adapter(0, rank=3)

# Names whose order as modules is not that of their tensors are among them ("q" and "q.x", say).
_NAMES = st.lists(st.text("lq.x_A", min_size=1, max_size=6), min_size=1, max_size=4, unique=True)


@st.composite
def _adapters(draw: st.DrawFn) -> tuple[AdapterState, AdapterShape]:
    rank = draw(st.integers(1, 4))
    sides = {name: (draw(st.integers(1, 5)), draw(st.integers(1, 5))) for name in draw(_NAMES)}
    values = np.random.default_rng(draw(st.integers(0, 2**32)))
    pairs = {
        name: LoraPair(
            values.standard_normal((rank, d_in)).astype(np.float32),
            values.standard_normal((d_out, rank)).astype(np.float32),
        )
        for name, (d_out, d_in) in sides.items()
    }
    own = {name: 3.0 for name in sides if draw(st.booleans())}
    return AdapterState(pairs, 2.0, own), AdapterShape(sides, rank, 2.0, own)


@given(adapter=_adapters(), data=st.data())
def test_the_file_is_the_wire_form_whatever_the_order_and_reads_back_to_the_bit(
    adapter: tuple[AdapterState, AdapterShape],
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    state, shape = adapter
    path = tmp_path_factory.mktemp("adapters") / "one.safetensors"
    order = data.draw(st.permutations(list(state.pairs.items())))
    file = write_adapter_file(path, order, shape=shape, fsync=False)

    assert path.read_bytes() == state.to_safetensors()
    sources: list[FactorSource] = [file, open_adapter_file(path, shape=shape)]
    for source in sources:
        assert (source.rank, source.modules) == (state.rank, state.modules)
        for module in state.modules:
            found, wanted = source.pair(module), state.pair(module)
            assert found.A.tobytes() == wanted.A.tobytes()
            assert found.B.tobytes() == wanted.B.tobytes()
            assert source.scaling_of(module) == state.scaling_of(module)
    assert in_memory(file).digest() == state.digest()
    assert (file.scaling, file.own_scalings) == (state.scaling, state.own_scalings)


def test_only_the_module_that_is_asked_for_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_adapter_file(tmp_path / "one", STATE.pairs.items(), shape=SHAPE)
    read: list[int] = []
    preadv = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append(preadv(descriptor, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counting)
    pair = file.pair("model.v_proj")
    assert sum(read) == pair.A.nbytes + pair.B.nbytes == 4 * 3 * (5 + 8)
    pair.A[0, 0] = 99.0
    assert file.pair("model.v_proj").A[0, 0] != 99.0


def test_reads_and_writes_that_come_in_pieces_are_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: preadv(fd, [bufs[0][:7]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    file = write_adapter_file(tmp_path / "one", STATE.pairs.items(), shape=SHAPE)
    assert file.path.read_bytes() == STATE.to_safetensors()
    assert in_memory(file).digest() == STATE.digest()


def _changed(**changes: LoraPair) -> list[tuple[str, LoraPair]]:
    return list({**STATE.pairs, **{f"model.{k}": pair for k, pair in changes.items()}}.items())


_Q, _V = STATE.pairs["model.q_proj"], STATE.pairs["model.v_proj"]

MISFITS: dict[str, tuple[list[tuple[str, LoraPair]], str]] = {
    "nothing": ([], r"2 modules missing; the first is model\.q_proj"),
    "one missing": ([("model.v_proj", _V)], r"1 modules missing; the first is model\.q_proj"),
    "one twice": ([*_changed(), ("model.q_proj", _Q)], r"model\.q_proj comes twice"),
    "one too many": (_changed(k_proj=_Q), r"model\.k_proj is not one of the adapter's"),
    "another rank": (_changed(q_proj=LoraPair(_Q.A[:2], _Q.B[:, :2])), r"\(2, 5\).*\(3, 5\)"),
    "another side": (_changed(q_proj=LoraPair(_Q.A, _Q.B[:5])), r"lora_B.*\(5, 3\).*\(6, 3\)"),
    "A transposed": (_changed(q_proj=LoraPair(_Q.A.T, _Q.B)), r"lora_A.*\(5, 3\).*\(3, 5\)"),
    "float64": (
        _changed(q_proj=LoraPair(_Q.A.astype(np.float64), _Q.B)),  # type: ignore[arg-type]
        r"float64, expected \(3, 5\) float32",
    ),
    "float16": (
        _changed(v_proj=LoraPair(_V.A, _V.B.astype(np.float16))),  # type: ignore[arg-type]
        r"lora_B.*float16, expected \(5, 3\) float32",
    ),
}


@pytest.mark.parametrize(("pairs", "words"), MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit_is_refused_and_leaves_the_earlier_file(
    tmp_path: Path, pairs: list[tuple[str, LoraPair]], words: str
) -> None:
    path = tmp_path / "one.safetensors"
    path.write_bytes(b"earlier")
    with pytest.raises(ShapeError, match=words):
        write_adapter_file(path, pairs, shape=SHAPE)
    assert path.read_bytes() == b"earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["one.safetensors"]


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, written = os.pwrite, []

    def fills_up(descriptor: int, data: memoryview, offset: int) -> int:
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(offset)
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", fills_up)
    with pytest.raises(OSError, match="No space left"):
        write_adapter_file(tmp_path / "one", STATE.pairs.items(), shape=SHAPE)
    assert list(tmp_path.iterdir()) == []


def test_the_modules_are_asked_for_one_at_a_time_and_let_go_of(tmp_path: Path) -> None:
    """A writer that gathers them first would hold the whole adapter."""
    on_disk: list[int] = []

    def pairs() -> Iterator[tuple[str, LoraPair]]:
        for item in STATE.pairs.items():
            (file,) = tmp_path.iterdir()
            on_disk.append(file.stat().st_size)
            yield item

    write_adapter_file(tmp_path / "one", pairs(), shape=SHAPE)
    header = len(SHAPE.safetensors_header())
    assert on_disk == [header, header + 4 * 3 * (6 + 5)]


def test_a_file_of_one_site_is_nobody_elses_when_it_says_so(tmp_path: Path) -> None:
    path = tmp_path / "one"
    write_adapter_file(path, STATE.pairs.items(), shape=SHAPE, mode=0o600, fsync=False)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_is_cut_is_noticed_when_opened_and_when_read(tmp_path: Path) -> None:
    path = tmp_path / "one"
    file = write_adapter_file(path, STATE.pairs.items(), shape=SHAPE)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ProtocolError, match=r"not an adapter of rank 3 on 2 modules"):
        open_adapter_file(path, shape=SHAPE)
    with pytest.raises(ProtocolError, match=r"ends within .*v_proj\.lora_B\.weight; it was cut"):
        in_memory(file)
    assert file.pair("model.q_proj").A.tobytes() == _Q.A.tobytes()


def test_a_file_of_another_shape_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "one"
    write_adapter_file(path, STATE.pairs.items(), shape=SHAPE)
    with pytest.raises(ProtocolError, match="not an adapter of rank 2"):
        open_adapter_file(path, shape=adapter_shape(2))


def test_the_file_travels_as_it_is(tmp_path: Path) -> None:
    file = write_adapter_file(tmp_path / "one", STATE.pairs.items(), shape=SHAPE)
    assert from_safetensors(file.path.read_bytes(), shape=SHAPE).digest() == STATE.digest()
    assert AdapterFile(file.path, SHAPE) == file
    with pytest.raises(KeyError, match="k_proj"):
        file.pair("model.k_proj")
