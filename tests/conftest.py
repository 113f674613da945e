"""Fixtures that several test files share. Everything is made here: nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no failure: no test is timed. Nor is luck: each law has the same examples in every run,
# and others only where somebody asks for them (pytest --hypothesis-profile=explore).
settings.register_profile(
    "explore", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=False
)
settings.register_profile("consilium", settings.get_profile("explore"), derandomize=True)
settings.load_profile("consilium")


def save_tiny_model(
    folder: Path, *, seed: int = 0, hidden_size: int = 32, intermediate_size: int = 64
) -> Path:
    """Write a randomly initialised Llama of 2 layers and its tokenizer to `folder`.

    The tokenizer is byte-level without merges: one token is one byte, 256 of them and
    <pad>, <s>, </s> (ids 0, 1, 2). The vocabulary is padded to 300 rows.
    """
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(BPE(vocab={t: i for i, t in enumerate(special + alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model folder; read only, copy it before changing a file."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"))
