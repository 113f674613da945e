"""AdapterState: a LoRA adapter as named factor pairs, its digest and its safetensors form.

A module's update is `scaling * B @ A` with A (r, d_in), B (d_out, r), float32 (Hu et al. 2106.09685,
section 4.1). Arrays are numpy: the relay and the coordinator's arithmetic need no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load

from common.config import LoraSection
from common.errors import ProtocolError, ShapeError
from common.files import Buffer

Float32 = npt.NDArray[np.float32]

_PREFIX = "base_model.model."


def tensor_names(module: str) -> tuple[str, str]:
    """Return PEFT's names of the tensors A and B of a module."""
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The factors of one module: A (r, d_in), B (d_out, r), float32."""

    A: Float32
    B: Float32

    @property
    def rank(self) -> int:
        """Rows of A, columns of B."""
        return int(self.A.shape[0])


class FactorSource(Protocol):
    """An adapter that is read one module at a time: in memory an AdapterState, on disk an AdapterFile."""

    @property
    def rank(self) -> int:
        """The rank of every module."""

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the modules, sorted."""

    def scaling_of(self, module: str) -> float:
        """Return what multiplies B @ A of a module."""

    def pair(self, module: str) -> LoraPair:
        """Return the factors of a module. Raises KeyError for a module that is not in `modules`."""


@dataclass(frozen=True, slots=True)
class AdapterState:
    """Factor pairs by module name, all of one rank, and the scaling that multiplies B @ A.

    pairs: module name as in the base model ("model.layers.0.self_attn.q_proj") -> LoraPair.
    scaling: alpha / rank, or alpha / sqrt(rank) for rsLoRA. own_scalings: of the modules that have an alpha
    of their own (lora.alpha-pattern).
    Raises ShapeError when the factors of a module do not fit, or ranks differ.
    """

    pairs: Mapping[str, LoraPair]
    scaling: float
    own_scalings: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", MappingProxyType(dict(sorted(self.pairs.items()))))
        object.__setattr__(self, "own_scalings", MappingProxyType(dict(self.own_scalings)))
        if not self.pairs:
            raise ShapeError("an adapter needs at least one module")
        for name, pair in self.pairs.items():
            if pair.A.ndim != 2 or pair.B.ndim != 2 or pair.A.shape[0] != pair.B.shape[1]:
                raise ShapeError(f"{name}: A {pair.A.shape} and B {pair.B.shape} do not multiply")
        if len({pair.rank for pair in self.pairs.values()}) != 1:
            raise ShapeError("the modules of an adapter have different ranks")

    @property
    def rank(self) -> int:
        """The rank of every module."""
        return next(iter(self.pairs.values())).rank

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the modules, sorted."""
        return tuple(self.pairs)

    @property
    def size_bytes(self) -> int:
        """Bytes of all factors in float32."""
        return sum(pair.A.nbytes + pair.B.nbytes for pair in self.pairs.values())

    def scaling_of(self, module: str) -> float:
        """Return what multiplies B @ A of a module."""
        return self.own_scalings.get(module, self.scaling)

    def pair(self, module: str) -> LoraPair:
        """Return the factors of a module. Raises KeyError for a module that is not in `modules`."""
        return self.pairs[module]

    def tensors(self) -> dict[str, Float32]:
        """Return PEFT's tensor names -> float32 arrays, sorted by name."""
        named: dict[str, Float32] = {}
        for name, pair in self.pairs.items():
            a, b = tensor_names(name)
            named[a], named[b] = pair.A, pair.B
        return dict(sorted(named.items()))

    def digest(self) -> str:
        """Return SHA-256 hex over sorted names, each with shape and little-endian float32 bytes."""
        return digest_tensors(self.tensors())

    def to_safetensors(self) -> bytes:
        """Return the wire form: byte for byte what the safetensors library writes, in one allocation."""
        tensors = self.tensors()
        header = _safetensors_header({name: array.shape for name, array in tensors.items()})
        arrays = (np.ascontiguousarray(array, dtype="<f4").data for array in tensors.values())
        return b"".join([header, *arrays])

    def unscaled(self) -> AdapterState:
        """Return the same update with scaling 1, which B carries."""
        pairs = {
            name: LoraPair(pair.A, (pair.B * np.float32(self.scaling_of(name))).astype(np.float32))
            for name, pair in self.pairs.items()
        }
        return AdapterState(pairs, 1.0)

    def factor_norm(self) -> float:
        """Return the largest Frobenius norm of a factor."""
        arrays = self.tensors().values()
        return max(float(np.linalg.norm(array.astype(np.float64))) for array in arrays)

    def is_finite(self) -> bool:
        """Whether no factor holds NaN or infinity."""
        return all(
            bool(np.isfinite(pair.A).all() and np.isfinite(pair.B).all())
            for pair in self.pairs.values()
        )


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """What an adapter of a given base and LoRA setting must look like.

    modules: module name -> (d_out, d_in). scaling, own_scalings: as in AdapterState.
    """

    modules: Mapping[str, tuple[int, int]]
    rank: int
    scaling: float
    own_scalings: Mapping[str, float] = field(default_factory=dict)

    def at_rank(self, rank: int, *, lora: LoraSection) -> AdapterShape:
        """Return the same modules at another rank, scaled as a LoRA setting says."""
        return adapter_shape_of(self.modules, rank=rank, lora=lora)

    def with_frozen(self, rank: int) -> AdapterShape:
        """Return the shape of what is sent when `rank` ranks that are not trained follow these ones.

        They are scaled as these are.
        """
        return replace(self, rank=self.rank + rank)

    @property
    def size_bytes(self) -> int:
        """Bytes of all factors in float32."""
        return sum(4 * self.rank * (d_out + d_in) for d_out, d_in in self.modules.values())

    def tensor_shapes(self) -> dict[str, tuple[int, int]]:
        """Return PEFT's tensor names -> shapes, sorted by name."""
        shapes: dict[str, tuple[int, int]] = {}
        for name, (d_out, d_in) in self.modules.items():
            a, b = tensor_names(name)
            shapes[a], shapes[b] = (self.rank, d_in), (d_out, self.rank)
        return dict(sorted(shapes.items()))

    def tensor_offsets(self) -> dict[str, int]:
        """Return PEFT's tensor names -> where each begins in the wire form, in bytes from its start."""
        offsets: dict[str, int] = {}
        start = len(self.safetensors_header())
        for name, dimensions in self.tensor_shapes().items():
            offsets[name] = start
            start += 4 * math.prod(dimensions)
        return offsets

    def safetensors_header(self) -> bytes:
        """Return what stands before the tensors in the wire form of every adapter of this shape."""
        return _safetensors_header(self.tensor_shapes())

    def safetensors_size(self) -> int:
        """Return the bytes of the wire form of every adapter of this shape, to the byte."""
        return len(self.safetensors_header()) + self.size_bytes


def adapter_shape_of(
    modules: Mapping[str, tuple[int, int]], *, rank: int, lora: LoraSection
) -> AdapterShape:
    """Return what an adapter on some modules looks like at a rank. modules: name -> (d_out, d_in)."""

    def scaling(alpha: float) -> float:
        return lora_scaling(alpha=alpha, rank=rank, use_rslora=lora.use_rslora)

    own: dict[str, float] = {}
    for ending, alpha in reversed(lora.alphas.items()):
        # As in PEFT: whole parts of the name, from its end, and the first pattern that fits counts.
        own |= {n: scaling(alpha) for n in modules if n == ending or n.endswith(f".{ending}")}
    return AdapterShape(modules, rank, scaling(lora.alpha), own)


def lora_scaling(*, alpha: float, rank: int, use_rslora: bool) -> float:
    """Return s in s * B @ A: alpha / rank, or alpha / sqrt(rank) (Kalajdzievski 2312.03732)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def digest_tensors(tensors: Mapping[str, Float32]) -> str:
    """Return SHA-256 hex over sorted names, each with its shape and little-endian float32 bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        digest.update(json.dumps([name, list(array.shape)]).encode() + b"\x00")
        digest.update(np.ascontiguousarray(array, dtype="<f4").data)
    return digest.hexdigest()


def from_safetensors(data: Buffer, *, shape: AdapterShape) -> AdapterState:
    """Return the adapter in safetensors bytes, which must be exactly of `shape`.

    In our own wire form its arrays are views of `data`, which nothing copies; in any other form of
    safetensors they are the library's copies.
    Raises ProtocolError when the bytes are no safetensors or too many, ShapeError when a tensor is
    missing, unknown, of another shape or not float32. Values are not looked at.
    """
    limit = max_safetensors_bytes(shape)
    if len(data) > limit:
        raise ProtocolError(f"an adapter of {len(data)} bytes, where at most {limit} are expected")
    if is_wire_form(data, shape=shape):
        return state_from_tensors(_views(data, shape), shape=shape)
    try:
        tensors = load(bytes(data))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        raise ProtocolError(f"{len(data)} bytes are not a safetensors file") from None
    return state_from_tensors(tensors, shape=shape)


def is_wire_form(data: Buffer, *, shape: AdapterShape) -> bool:
    """Whether bytes are what `to_safetensors` writes for an adapter of a shape, whatever its values.

    Safetensors files with the same tensors may hold more: metadata, a key twice, spaces.
    """
    header = shape.safetensors_header()
    return len(data) == len(header) + shape.size_bytes and data[: len(header)] == header


def max_safetensors_bytes(shape: AdapterShape) -> int:
    """Return how large a safetensors file of a shape may be: its tensors, and room for any header of them."""
    return shape.size_bytes + 1024 * (len(shape.modules) + 8)


def _views(data: Buffer, shape: AdapterShape) -> dict[str, Float32]:
    offsets = shape.tensor_offsets()
    views: dict[str, Float32] = {}
    for name, dimensions in shape.tensor_shapes().items():
        count, start = math.prod(dimensions), offsets[name]
        views[name] = np.frombuffer(data, "<f4", count=count, offset=start).reshape(dimensions)
    return views


def _safetensors_header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """Return the length and the JSON that the safetensors library writes before float32 tensors.

    shapes: of the tensors, in their order in the file, which is that of their names.
    Source: the safetensors format's description; the padding to 8 bytes is the library's.
    """
    header, offset = {}, 0
    for name, dimensions in shapes.items():
        end = offset + 4 * math.prod(dimensions)
        header[name] = {
            "dtype": "F32",
            "shape": list(dimensions),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def state_from_tensors(tensors: Mapping[str, Float32], *, shape: AdapterShape) -> AdapterState:
    """Return named tensors as an adapter of `shape`. Raises ShapeError naming what does not fit."""
    expected = shape.tensor_shapes()
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unknown:
        raise ShapeError(
            f"{len(missing)} tensors missing, {len(unknown)} not expected"
            + (f"; first missing {missing[0]}" if missing else "")
        )
    for name, dimensions in expected.items():
        array = tensors[name]
        if tuple(array.shape) != dimensions:
            raise ShapeError(f"{name} is {tuple(array.shape)}, expected {dimensions}")
        if array.dtype != np.float32:
            raise ShapeError(f"{name} is {array.dtype}, expected float32")
    pairs = {
        name: LoraPair(*(tensors[tensor] for tensor in tensor_names(name)))
        for name in shape.modules
    }
    return AdapterState(pairs, shape.scaling, shape.own_scalings)
