"""Randomly initialised models of every family that is tested, and examples for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
)

from common.model import BaseModel
from common.prompts import Example

VOCABULARY = 300
_SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
_HEADS: dict[str, Any] = {"num_attention_heads": 4}

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_key_value_heads=2, **_HEADS, **_SPECIAL,
    ),
    "qwen3": lambda: Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_key_value_heads=2, head_dim=8, **_HEADS, **_SPECIAL,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **_SPECIAL
    ),
    "bloom": lambda: BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **_SPECIAL
    ),
    "falcon": lambda: FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, **_HEADS, **_SPECIAL
    ),
}  # fmt: skip


# d_out and d_in in each layer of the Llama of tests/conftest.py: hidden 32, 4 heads of 8, 2 key-value
# heads, intermediate 64.
LLAMA_SIDES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (64, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
}


class _Tokenizer:
    pad_token_id = 0
    eos_token_id = 2
    bos_token_id = 1


def tiny_base(family: str, *, seed: int = 0) -> BaseModel:
    """Return an unquantised base of a family, on the CPU, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    model.requires_grad_(False)
    model.config.use_cache = False
    model.eval()
    return BaseModel(model, _Tokenizer(), f"{family}-{seed}", torch.device("cpu"))


def make_examples(count: int, *, lengths: tuple[int, ...], num_answer: int = 3) -> list[Example]:
    """Return examples of the given lengths, cycled, the same every time."""
    random = torch.Generator().manual_seed(5)
    return [
        Example(
            tuple(
                torch.randint(
                    3, VOCABULARY, (lengths[i % len(lengths)],), generator=random
                ).tolist()
            ),
            num_answer,
        )
        for i in range(count)
    ]
