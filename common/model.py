"""The base model: load it, quantise it, keep it.

Which model it is, common/model_folder.py proves. Only safetensors and tokenizer.json-style folders are
read; code that comes with a model never runs (trust_remote_code stays off). One quantised base serves
every adapter of a process: common/lora.py lends it with LoRA layers and takes them off again.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from common.config import ModelSection
from common.errors import ModelError
from common.model_folder import check_digest, digest_model

logger = logging.getLogger(__name__)

Quantization = Literal["nf4", "int8", "none"]


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded, quantised, frozen base and its tokenizer. `digest`: `digest_model` of its folder."""

    model: nn.Module
    tokenizer: Any
    digest: str
    device: torch.device

    @property
    def pad_id(self) -> int:
        """The id that fills batches; padding is masked, so any id does."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else int(self.tokenizer.eos_token_id or 0)


def choose_device(wanted: str = "auto") -> torch.device:
    """Return "auto" as CUDA where there is one, else CPU; any other name as it stands."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted)


def load_base(
    folder: Path, section: ModelSection, *, device: torch.device, expected_digest: str = ""
) -> BaseModel:
    """Return the base model of a folder, quantised and frozen; the newest one is kept in memory.

    expected_digest: refuse any other model; "" accepts what is there.
    Raises SignatureError when the digest differs, ModelError when the model cannot be loaded.
    """
    digest = check_digest(folder, expected_digest) if expected_digest else digest_model(folder)
    return _load(str(folder), digest, section.quantization, section.compute_dtype, str(device))


def release_base() -> None:
    """Drop the base model kept in memory."""
    _load.cache_clear()
    gc.collect()


def _is_quantized(module: nn.Module) -> bool:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return isinstance(module, Linear4bit | Linear8bitLt)


@lru_cache(maxsize=1)
def _load(
    folder: str, digest: str, quantization: Quantization, compute_dtype: str, device_name: str
) -> BaseModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    device = torch.device(device_name)
    if compute_dtype == "auto":
        compute_dtype = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, compute_dtype)
    quantized: Any = None
    if quantization == "nf4":
        quantized = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif quantization == "int8":
        # A threshold would pick outlier columns over the whole batch: one record's outlier would change
        # how every other record is computed, and per-record clipping would bound nothing.
        quantized = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_8bit=True, llm_int8_threshold=0.0
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=quantized,
            use_safetensors=True,
            trust_remote_code=False,
            device_map={"": device},
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"model folder {folder} could not be loaded: {error}") from None
    if quantized is not None and not any(_is_quantized(m) for m in model.modules()):
        kinds = sorted({type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear)})
        raise ModelError(
            f"model.quantization = {quantization!r} quantises no layer of this model: transformers "
            f"leaves its {', '.join(kinds)} as they are; use model.quantization = 'none'"
        )
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks NF4 weights for a bfloat16 kernel at the first
        # inference: other numbers than in training, no way back, and an assertion for widths that 32
        # does not divide (0.50).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
    model.requires_grad_(False)
    model.config.use_cache = False
    model.eval()
    logger.info("loaded base model %s (%s, %s)", digest[:16], quantization, compute_dtype)
    return BaseModel(model, tokenizer, digest, device)
