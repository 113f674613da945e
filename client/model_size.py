"""How much memory and disk a base model and an adapter on it take, from its safetensors headers alone.

An estimate, for a person who wonders whether a machine will do: no weight is read and no model is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.errors import ModelError

# Matrices that bitsandbytes leaves as they are: embeddings and the output head, by part of their name.
_EMBEDDINGS = ("embed", "wte", "wpe", "lm_head")
# NF4 with double quantisation: 4 bits, 8 bits for every 64 weights, 32 for every 64 x 256.
# Source: Dettmers et al. 2305.14314, section 3.
_NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
_FLOAT32_BYTES = 4
# An adapter, its gradient and AdamW's two moments.
_TRAINED_COPIES = 4
# Logits, their softmax and its gradient, float32.
_LOGIT_COPIES = 3


@dataclass(frozen=True, slots=True)
class Workload:
    """What one step trains at once. records: of a micro-batch; tokens: of each record."""

    rank: int
    records: int
    tokens: int


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A base model in numbers. file_bytes: of its safetensors files.

    quantised: parameters in matrices that NF4 quantises; other: all others. inputs, outputs: summed over
    these matrices, d_in and d_out. vocabulary: rows of its largest embedding.
    """

    file_bytes: int
    quantised: int
    other: int
    inputs: int
    outputs: int
    vocabulary: int

    def base_bytes(self, *, float_bytes: int, nf4: bool = True) -> int:
        """Return the memory of the loaded base. float_bytes: of a parameter that is not quantised."""
        quantised_bytes = _NF4_BYTES if nf4 else float_bytes
        return round(self.quantised * quantised_bytes) + self.other * float_bytes

    def adapter_bytes(self, rank: int) -> int:
        """Return the bytes of an adapter of a rank on every one of these matrices, float32."""
        return rank * (self.inputs + self.outputs) * _FLOAT32_BYTES

    def training_bytes(self, work: Workload, *, float_bytes: int) -> int:
        """Return roughly what training needs beside the base, without gradient checkpointing.

        The adapter, its gradient and optimizer state; each record's own gradient, which DP clips; the
        input of each layer, also in float32 for the adapter, and its output; logits. On a CPU it was 5 to
        9 % above the highest sum of live tensors, for Llamas of 20 million and of a billion parameters; on
        a GPU it was not measured.
        """
        adapter = self.adapter_bytes(work.rank)
        cast_bytes = 0 if float_bytes == _FLOAT32_BYTES else _FLOAT32_BYTES
        per_token = (
            self.inputs * (float_bytes + cast_bytes)
            + self.outputs * float_bytes
            + self.vocabulary * _FLOAT32_BYTES * _LOGIT_COPIES
        )
        return adapter * (_TRAINED_COPIES + work.records) + work.records * work.tokens * per_token


def read_model_size(folder: Path) -> ModelSize:
    """Return the size of a model folder. Raises ModelError when it has no whole safetensors file."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"model folder {folder} lacks *.safetensors")
    quantised = other = inputs = outputs = vocabulary = 0
    for path in files:
        for name, shape in _shapes(path):
            count = 1
            for side in shape:
                count *= side
            if len(shape) != 2:
                other += count
            elif any(part in name for part in _EMBEDDINGS):
                other += count
                vocabulary = max(vocabulary, shape[0])
            else:
                quantised += count
                outputs, inputs = outputs + shape[0], inputs + shape[1]
    file_bytes = sum(path.stat().st_size for path in files)
    return ModelSize(file_bytes, quantised, other, inputs, outputs, vocabulary)


def _shapes(path: Path) -> list[tuple[str, list[int]]]:
    try:
        with safe_open(path, framework="numpy") as file:
            return [(name, file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} cannot be read as safetensors ({type(error).__name__}); copy it again"
        ) from None
