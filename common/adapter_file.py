"""AdapterFile: an adapter on disk, in the wire form, of which one module at a time is in memory.

Reads are positioned and into arrays of their own: a mapping would let the kernel count whole files as this
process's memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np

from common.adapter import AdapterShape, Float32, LoraPair, tensor_names
from common.errors import ProtocolError, ShapeError
from common.files import replacing


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A file that holds exactly the wire form of an adapter of `shape`.

    Made by `write_adapter_file` or `open_adapter_file`.
    """

    path: Path
    shape: AdapterShape
    # Found once: asking the shape anew for every module would cost more than reading it.
    _offsets: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_offsets", MappingProxyType(self.shape.tensor_offsets()))

    @property
    def rank(self) -> int:
        """The rank of every module."""
        return self.shape.rank

    @property
    def scaling(self) -> float:
        """What multiplies B @ A of every module that has no scaling of its own."""
        return self.shape.scaling

    @property
    def own_scalings(self) -> Mapping[str, float]:
        """Module -> scaling, of those that have one of their own."""
        return self.shape.own_scalings

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the modules, sorted."""
        return tuple(sorted(self.shape.modules))

    def scaling_of(self, module: str) -> float:
        """Return what multiplies B @ A of a module."""
        return self.own_scalings.get(module, self.scaling)

    def pair(self, module: str) -> LoraPair:
        """Return the factors of a module, read from the file into arrays of their own.

        Raises KeyError for a module that is not in `modules`, ProtocolError when the file ends too early
        and OSError when it cannot be read.
        """
        d_out, d_in = self.shape.modules[module]
        a, b = tensor_names(module)
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return LoraPair(
                self._read(descriptor, a, (self.rank, d_in)),
                self._read(descriptor, b, (d_out, self.rank)),
            )
        finally:
            os.close(descriptor)

    def _read(self, descriptor: int, name: str, dimensions: tuple[int, int]) -> Float32:
        array = np.empty(dimensions, "<f4")
        left, offset = array.data.cast("B"), self._offsets[name]
        while left:
            count = os.preadv(descriptor, [left], offset)
            if count == 0:
                raise ProtocolError(
                    f"{self.path} ends within {name}; it was cut, and must be written again"
                )
            left, offset = left[count:], offset + count
        return array


def write_adapter_file(
    path: Path,
    pairs: Iterable[tuple[str, LoraPair]],
    *,
    shape: AdapterShape,
    mode: int = 0o644,
    fsync: bool = True,
) -> AdapterFile:
    """Write an adapter atomically, module after module as they come, and return it.

    pairs: every module of `shape` once, in any order. mode, fsync: see `common.files.replacing`.
    Raises ShapeError for a module that is missing, twice or unknown, or whose factors are of another shape
    or dtype, and OSError when the disk is full; what stood at `path` before is untouched then.
    """
    file = AdapterFile(path, shape)
    missing = set(shape.modules)
    with replacing(path, mode=mode, fsync=fsync) as target:
        descriptor = target.fileno()
        _write(descriptor, shape.safetensors_header(), 0)
        for module, pair in pairs:
            if module not in missing:
                problem = (
                    "comes twice" if module in shape.modules else "is not one of the adapter's"
                )
                raise ShapeError(f"module {module} {problem}; give each of its modules once")
            missing.remove(module)
            d_out, d_in = shape.modules[module]
            wanted = ((shape.rank, d_in), (d_out, shape.rank))
            for name, array, dimensions in zip(
                tensor_names(module), (pair.A, pair.B), wanted, strict=True
            ):
                if array.shape != dimensions or array.dtype != np.float32:
                    raise ShapeError(
                        f"{name} is {array.shape} {array.dtype}, expected {dimensions} float32"
                    )
                content = np.ascontiguousarray(array, "<f4").data.cast("B")
                _write(descriptor, content, file._offsets[name])
        if missing:
            raise ShapeError(f"{len(missing)} modules missing; the first is {min(missing)}")
    return file


def open_adapter_file(path: Path, *, shape: AdapterShape) -> AdapterFile:
    """Return the adapter in a file.

    Raises ProtocolError when it is not the wire form of an adapter of `shape`, as far as header and size
    tell, and OSError when it cannot be read.
    """
    header = shape.safetensors_header()
    with path.open("rb") as file:
        found, size = file.read(len(header)), os.fstat(file.fileno()).st_size
    if found != header or size != shape.safetensors_size():
        raise ProtocolError(
            f"{path} ({size} bytes) is not an adapter of rank {shape.rank} on {len(shape.modules)} modules "
            f"in wire form ({shape.safetensors_size()} bytes); write it again"
        )
    return AdapterFile(path, shape)


def _write(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    left = memoryview(content)
    while left:
        count = os.pwrite(descriptor, left, offset)
        left, offset = left[count:], offset + count
