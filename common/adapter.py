"""AdapterState: a LoRA adapter as named factor pairs, its digest and its safetensors form.

A module's update is `scaling * B @ A` with A (r, d_in), B (d_out, r), float32 (Hu et al. 2106.09685,
section 4.1). Arrays are numpy: the relay and the coordinator's arithmetic need no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.errors import ProtocolError, ShapeError

Float32 = npt.NDArray[np.float32]

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The factors of one module: A (r, d_in), B (d_out, r), float32."""

    A: Float32
    B: Float32

    @property
    def rank(self) -> int:
        """Rows of A, columns of B."""
        return int(self.A.shape[0])


@dataclass(frozen=True, slots=True)
class AdapterState:
    """Factor pairs by module name, all of one rank, and the scaling that multiplies B @ A.

    pairs: module name as in the base model ("model.layers.0.self_attn.q_proj") -> LoraPair.
    scaling: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    Raises ShapeError when the factors of a module do not fit, or ranks differ.
    """

    pairs: Mapping[str, LoraPair]
    scaling: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", MappingProxyType(dict(sorted(self.pairs.items()))))
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
    def size_bytes(self) -> int:
        """Bytes of all factors in float32."""
        return sum(pair.A.nbytes + pair.B.nbytes for pair in self.pairs.values())

    def tensors(self) -> dict[str, Float32]:
        """Return PEFT's tensor names -> float32 arrays, sorted by name."""
        named: dict[str, Float32] = {}
        for name, pair in self.pairs.items():
            named[f"{_PREFIX}{name}{_A}"] = pair.A
            named[f"{_PREFIX}{name}{_B}"] = pair.B
        return dict(sorted(named.items()))

    def digest(self) -> str:
        """Return SHA-256 hex over sorted names, each with shape and little-endian float32 bytes."""
        return digest_tensors(self.tensors())

    def to_safetensors(self) -> bytes:
        """Return the wire form."""
        data: bytes = save({n: np.ascontiguousarray(a) for n, a in self.tensors().items()})
        return data

    def product_norm_bound(self) -> float:
        """Return an upper bound of every module's Frobenius norm of scaling * B @ A."""
        return max(
            self.scaling
            * float(np.linalg.norm(pair.A.astype(np.float64)))
            * float(np.linalg.norm(pair.B.astype(np.float64)))
            for pair in self.pairs.values()
        )

    def is_finite(self) -> bool:
        """Whether no factor holds NaN or infinity."""
        return all(
            bool(np.isfinite(pair.A).all() and np.isfinite(pair.B).all())
            for pair in self.pairs.values()
        )


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """What an adapter of a given base and LoRA setting must look like.

    modules: module name -> (d_out, d_in).
    """

    modules: Mapping[str, tuple[int, int]]
    rank: int
    scaling: float

    def at_rank(self, rank: int, *, scaling: float) -> AdapterShape:
        """Return the same modules at another rank."""
        return AdapterShape(self.modules, rank, scaling)

    @property
    def size_bytes(self) -> int:
        """Bytes of all factors in float32."""
        return sum(4 * self.rank * (d_out + d_in) for d_out, d_in in self.modules.values())


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


def from_safetensors(data: bytes, *, shape: AdapterShape) -> AdapterState:
    """Return the adapter in safetensors bytes, which must be exactly of `shape`.

    Raises ProtocolError when the bytes are no safetensors or too many, ShapeError when a tensor is
    missing, unknown, of another shape or not float32. Values are not looked at.
    """
    limit = shape.size_bytes + 1024 * (len(shape.modules) + 8)
    if len(data) > limit:
        raise ProtocolError(f"an adapter of {len(data)} bytes, where at most {limit} are expected")
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        raise ProtocolError(f"{len(data)} bytes are not a safetensors file") from None
    return state_from_tensors(tensors, shape=shape)


def state_from_tensors(tensors: Mapping[str, Float32], *, shape: AdapterShape) -> AdapterState:
    """Return named tensors as an adapter of `shape`. Raises ShapeError naming what does not fit."""
    expected: dict[str, tuple[int, int]] = {}
    for name, (d_out, d_in) in shape.modules.items():
        expected[f"{_PREFIX}{name}{_A}"] = (shape.rank, d_in)
        expected[f"{_PREFIX}{name}{_B}"] = (d_out, shape.rank)
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
        name: LoraPair(tensors[f"{_PREFIX}{name}{_A}"], tensors[f"{_PREFIX}{name}{_B}"])
        for name in shape.modules
    }
    return AdapterState(pairs, shape.scaling)
