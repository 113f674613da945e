"""The embedded model: as recorded, small, loadable without a network, and fluent in notes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from simulations.embedded import embedded_model_dir
from simulations.embedded.make_model import (
    ModelSpec,
    main,
    make_model,
    mean_token_loss,
    pack_documents,
    validation_blocks,
)
from simulations.embedded.prose import write_documents
from simulations.synthetic import SyntheticSpec, generate_hospitals

LIMIT_BYTES = 4_000_000
MODEL = embedded_model_dir()


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    recorded: dict[str, Any] = json.loads((MODEL / "MADE.json").read_text(encoding="utf-8"))
    return recorded


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(MODEL)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return loaded


def _tiny(**changes: Any) -> ModelSpec:
    sizes: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 1,
        "documents": 40,
        "steps": 3,
        "batch_size": 2,
        "block_length": 32,
    }
    return ModelSpec(**{**sizes, **changes})


def test_every_file_has_the_recorded_digest(made: dict[str, Any]) -> None:
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in MODEL.iterdir()
        if path.name != "MADE.json"
    }
    assert digests == made["sha256"]
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= set(
        digests
    )


def test_folder_is_small_and_readable_by_all() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= LIMIT_BYTES
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in MODEL.iterdir())


def test_model_was_made_with_the_script_as_it_stands(made: dict[str, Any]) -> None:
    spec = ModelSpec()
    assert {field.name: made[field.name] for field in fields(spec)} == {
        field.name: getattr(spec, field.name) for field in fields(spec)
    }


def test_loads_offline_in_a_fresh_process() -> None:
    script = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        "m = M.from_pretrained(sys.argv[1]); t = T.from_pretrained(sys.argv[1]); "
        "assert m.config.vocab_size >= len(t); assert m.config.eos_token_id == t.eos_token_id; "
        "print(type(m).__name__, next(m.parameters()).dtype)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(MODEL)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LlamaForCausalLM", "torch.float32"]


def test_every_layer_fits_the_nf4_kernels_of_processors_with_bfloat16(
    model: torch.nn.Module,
) -> None:
    # bitsandbytes 0.50 repacks 4-bit weights there, in blocks of 64 inputs and 32 outputs, and
    # fails on any other shape (seen with 352 inputs).
    layers = [m for n, m in model.named_modules() if n.endswith("_proj")]
    assert len(layers) == 7 * ModelSpec().num_layers
    for layer in layers:
        assert isinstance(layer, torch.nn.Linear)
        assert (layer.in_features % 64, layer.out_features % 32) == (0, 0)


def test_any_text_goes_through_the_tokenizer_and_back(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Ünïcode ☂ 漢字\n\n### Response:\n\tno-such-word 0x00 \x7f"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) == text
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert tokenizer.eos_token_id not in ids


def test_prompt_with_answer_takes_60_to_110_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = [
        len(
            tokenizer(
                f"### Instruction:\n{r.instruction}\n\n### Input:\n{r.input}\n\n"
                f"### Response:\n{r.output}"
            )["input_ids"]
        )
        for r in generate_hospitals(SyntheticSpec(num_sites=1, patients_per_site=1)).central_test
    ]
    assert 60 <= sum(lengths) / len(lengths) <= 100
    assert max(lengths) <= 110


def test_loss_on_unseen_notes_is_the_recorded_one_and_far_below_chance(
    made: dict[str, Any], model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast
) -> None:
    loss = mean_token_loss(model, validation_blocks(tokenizer, ModelSpec()))
    # Float sums differ a little between processors; a change to the prose moves it more.
    assert loss == pytest.approx(made["validation_loss"], abs=0.01)
    assert loss < math.log(ModelSpec().vocab_size) / 3


def test_base_does_not_know_the_answers(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast
) -> None:
    losses = []
    for record in generate_hospitals(SyntheticSpec(test_records=24)).central_test:
        prompt = tokenizer(
            f"### Instruction:\n{record.instruction}\n\n### Input:\n{record.input}\n\n"
            "### Response:\n"
        )["input_ids"]
        answer = tokenizer(record.output, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=labels).loss))
    assert 2.8 < sum(losses) / len(losses) < 5.5


def test_prose_holds_no_answer_and_no_question_form() -> None:
    prose = "\n".join(write_documents(seed=0, count=2000))
    assert "### Response:" not in prose
    assert "### Instruction:" not in prose
    for record in generate_hospitals(SyntheticSpec(num_sites=1)).central_test:
        assert record.output not in prose


def test_packed_blocks_hold_the_documents_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = pack_documents(tokenizer, ["Seen with fever.", "No change."], block_length=4)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    whole = f"{bos}Seen with fever.{eos}{bos}No change.{eos}"
    stream = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert blocks.shape == (len(stream) // 4, 4)
    assert blocks.flatten().tolist() == stream[: blocks.numel()]


def test_same_seed_makes_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    once, again, other = (
        make_model(_tiny(seed=seed), tmp_path / name, command="test", console=quiet)["sha256"]
        for name, seed in (("once", 0), ("again", 0), ("other", 5))
    )
    assert once == again
    assert once["model.safetensors"] != other["model.safetensors"]
    assert once["tokenizer.json"] != other["tokenizer.json"]


def test_script_says_what_it_wrote_and_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr("simulations.embedded.make_model.ModelSpec", _tiny)
    assert main(["--out", str(tmp_path / "m"), "--steps", "2", "--seed", "1"]) == 0
    said = capsys.readouterr().out
    assert "validation loss" in said
    assert str(tmp_path / "m") in said
    recorded = json.loads((tmp_path / "m" / "MADE.json").read_text(encoding="utf-8"))
    assert (recorded["steps"], recorded["seed"]) == (2, 1)
    assert recorded["command"].startswith("python -m simulations.embedded.make_model --out")
