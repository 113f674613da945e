"""The base model: which one it is, how it is quantised and kept."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from common.config import ModelSection
from common.errors import ModelError, SignatureError
from common.model import BaseModel, choose_device, load_base, release_base
from common.model_folder import digest_model, resolve_model
from tests.unit.tiny import LLAMA_SIDES

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 70, 80, 90, 100, 2]])


@pytest.fixture
def copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


# Folders and digests


def test_digest_is_the_same_for_a_copy(tiny_model_dir: Path, copy: Path) -> None:
    assert digest_model(copy) == digest_model(tiny_model_dir)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("position", [0, -1])
def test_digest_changes_with_any_byte(
    tiny_model_dir: Path, copy: Path, name: str, position: int
) -> None:
    content = bytearray((copy / name).read_bytes())
    content[position] ^= 1
    (copy / name).write_bytes(content)

    assert digest_model(copy) != digest_model(tiny_model_dir)


def test_change_in_place_is_seen_by_a_process_that_digested_before(copy: Path) -> None:
    before = digest_model(copy)
    path = copy / "config.json"
    path.write_bytes(path.read_bytes().replace(b"32", b"64", 1))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))

    assert digest_model(copy) != before


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "merges.txt", "spiece.model", "extra.safetensors", "a.json"]
)
def test_digest_changes_with_a_file_that_would_be_read(
    tiny_model_dir: Path, copy: Path, name: str
) -> None:
    (copy / name).write_bytes(b"")

    assert digest_model(copy) != digest_model(tiny_model_dir)


def test_digest_changes_when_a_file_is_renamed(tiny_model_dir: Path, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "other.safetensors")

    assert digest_model(copy) != digest_model(tiny_model_dir)


def test_files_that_are_never_read_do_not_change_the_digest(
    tiny_model_dir: Path, copy: Path
) -> None:
    (copy / "README.md").write_text("read me")
    (copy / "modeling_evil.py").write_text("raise SystemExit")

    assert digest_model(copy) == digest_model(tiny_model_dir)


@pytest.mark.parametrize("check", [digest_model, lambda f: resolve_model(_section(f), known={})])
def test_folder_without_safetensors_is_refused_with_a_hint(copy: Path, check: object) -> None:
    assert callable(check)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks \*\.safetensors$"):
        check(copy)
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"lacks \*\.safetensors; it holds pickled \*\.bin"):
        check(copy)


def test_all_missing_parts_of_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lacks config.json, \*.safetensors, tokenizer files$"):
        digest_model(tmp_path)


def _section(folder: Path | str) -> ModelSection:
    return ModelSection(name=str(folder))


def test_known_names_come_before_folders(
    copy: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy.parent)

    assert resolve_model(_section("model"), known={}) == copy.resolve()
    assert resolve_model(_section("model"), known={"model": tiny_model_dir}) == (
        tiny_model_dir.resolve()
    )


@pytest.mark.parametrize("hub", [False, True])
def test_name_that_is_nowhere_is_refused(hub: bool) -> None:
    with pytest.raises(ModelError, match=r"model.name = 'nobody/nothing' is "):
        resolve_model(_section("nobody/nothing"), known={"embedded": Path()}, hub=hub)


# Loading


def test_wrong_digest_is_refused_before_loading(tiny_model_dir: Path) -> None:
    with pytest.raises(SignatureError, match=r"expected ffffffffffffffff\.\.\."):
        load_base(tiny_model_dir, ModelSection(), device=CPU, expected_digest="f" * 64)


def test_right_digest_is_accepted(tiny_model_dir: Path) -> None:
    digest = digest_model(tiny_model_dir)

    loaded = load_base(
        tiny_model_dir, ModelSection(quantization="none"), device=CPU, expected_digest=digest
    )

    assert loaded.digest == digest


def test_base_is_frozen_in_evaluation_mode_and_answers(base: BaseModel) -> None:
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    assert not base.model.config.use_cache
    assert _logits(base.model).shape == (1, 6, 300)
    assert torch.isfinite(_logits(base.model)).all()
    assert base.pad_id == 0
    assert base.device == CPU


def test_newest_base_is_kept_in_memory(tiny_model_dir: Path) -> None:
    section = ModelSection(quantization="none")
    first = load_base(tiny_model_dir, section, device=CPU)

    assert load_base(tiny_model_dir, section, device=CPU) is first
    release_base()
    assert load_base(tiny_model_dir, section, device=CPU) is not first


def test_nf4_base_is_four_bit_with_double_quantisation_and_no_cpu_kernel(
    tiny_model_dir: Path,
) -> None:
    model = load_base(tiny_model_dir, ModelSection(quantization="nf4"), device=CPU).model
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]

    assert len(layers) == 2 * len(LLAMA_SIDES)
    assert type(model.get_output_embeddings()) is nn.Linear
    _logits(model)
    for layer in layers:
        assert layer.weight.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert layer.weight.dtype == torch.uint8
        assert not layer.support_avx512bf16_for_cpu


def test_int8_base_is_eight_bit(tiny_model_dir: Path) -> None:
    model = load_base(tiny_model_dir, ModelSection(quantization="int8"), device=CPU).model
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt)]

    assert len(layers) == 2 * len(LLAMA_SIDES)
    assert all(layer.weight.dtype == torch.int8 for layer in layers)


def test_unquantised_base_speaks_the_dtype_that_is_asked_for(tiny_model_dir: Path) -> None:
    section = ModelSection(quantization="none", compute_dtype="bfloat16")
    automatic = ModelSection(quantization="none")

    def dtypes(chosen: ModelSection) -> set[torch.dtype]:
        return {p.dtype for p in load_base(tiny_model_dir, chosen, device=CPU).model.parameters()}

    assert dtypes(section) == {torch.bfloat16}
    assert dtypes(automatic) == {torch.float32}


def test_quantised_bases_answer_almost_as_the_plain_one(
    base: BaseModel, tiny_model_dir: Path
) -> None:
    from transformers import AutoModelForCausalLM

    exact = _logits(AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32))

    # Four bits on a random model: 0.21 measured; eight bits: 0.01.
    assert (_logits(base.model) - exact).norm() / exact.norm() < 0.35


def test_model_that_cannot_be_loaded_is_refused_in_words(copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "nonsense"}')

    with pytest.raises(ModelError, match="could not be loaded"):
        load_base(copy, ModelSection(quantization="none"), device=CPU)


def test_code_that_comes_with_a_model_never_runs(copy: Path) -> None:
    proof = copy / "ran"
    (copy / "evil.py").write_text(f"open({str(proof)!r}, 'w').close()\nclass Evil: pass\n")
    (copy / "config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", '
        '"AutoModelForCausalLM": "evil.Evil"}}'
    )

    with pytest.raises(ModelError, match="could not be loaded"):
        load_base(copy, ModelSection(quantization="none"), device=CPU)

    assert not proof.exists()


def test_device_is_chosen_or_taken_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cpu") == CPU
