"""The exported PEFT folder: loadable by PEFT alone, and the same model."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from common.adapter import AdapterState, LoraPair, lora_scaling
from common.config import LoraSection, ModelSection
from common.lora import attached, carrying, initial_adapter, write_adapter
from common.model import BaseModel, load_base
from common.prompts import Example, Examples
from server.evaluation import evaluate_model
from server.export.adapter import export_adapter
from tests.unit.adapters import random_adapter

# Nine letters each; the answer is the last four.
EXAMPLES = Examples(
    Example(tuple(3 + (7 * row + 5 * i) % 250 for i in range(9)), 4) for row in range(4)
)


def _trained(base: BaseModel, lora: LoraSection) -> AdapterState:
    """An adapter that moved: PEFT's initial A, and a B that is not zero."""
    start = initial_adapter(base, lora, seed=0)
    random = np.random.default_rng(0)
    return AdapterState(
        {
            name: LoraPair(pair.A, (0.3 * random.standard_normal(pair.B.shape)).astype(np.float32))
            for name, pair in start.pairs.items()
        },
        start.scaling,
        start.own_scalings,
    )


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(
    "lora",
    [
        LoraSection(rank=4, alpha=4.0),
        LoraSection(rank=4, alpha=16.0),
        LoraSection(rank=4, alpha=6.0, use_rslora=True),
        LoraSection(rank=3, alpha=8.0, target_modules="q_proj,v_proj", dropout=0.1),
    ],
    ids=["plain", "alpha above rank", "rslora", "two modules"],
)
def test_peft_alone_loads_the_folder_and_computes_the_same_loss(
    tiny_model_dir: Path, tmp_path: Path, lora: LoraSection, quantization: str
) -> None:
    from peft import PeftModel

    section = ModelSection(quantization=quantization)  # type: ignore[arg-type]
    base = load_base(tiny_model_dir, section, device=torch.device("cpu"))
    state = _trained(base, lora)
    assert state.scaling == lora_scaling(
        alpha=lora.alpha, rank=lora.rank, use_rslora=lora.use_rslora
    )
    untouched = evaluate_model(base.model, base, EXAMPLES, batch_size=4).loss
    with attached(base, lora) as model:
        write_adapter(model, state)
        attached_loss = evaluate_model(model, base, EXAMPLES, batch_size=4).loss
    folder = export_adapter(state, tmp_path / "adapter", lora=lora, base_name="tiny")

    loaded = PeftModel.from_pretrained(base.model, str(folder))
    try:
        loaded_loss = evaluate_model(loaded, base, EXAMPLES, batch_size=4).loss
    finally:
        loaded.unload()
    assert abs(attached_loss - untouched) > 1e-2
    assert loaded_loss == pytest.approx(attached_loss, abs=1e-4)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_an_export_above_a_layers_side_and_with_own_scalings_has_the_logits_of_evaluation(
    tiny_model_dir: Path, tmp_path: Path, quantization: str
) -> None:
    """Rank 40, as of stacked adapters; most layers have a side of 16 or 32."""
    from peft import PeftModel

    section = ModelSection(quantization=quantization)  # type: ignore[arg-type]
    base = load_base(tiny_model_dir, section, device=torch.device("cpu"))
    lora = LoraSection(
        rank=4, alpha=6.0, use_rslora=True, alpha_pattern="q_proj=24,1.mlp.up_proj=1.5"
    )
    start, random = _trained(base, lora), np.random.default_rng(1)
    wide = {
        name: LoraPair(
            (0.1 * random.standard_normal((40, pair.A.shape[1]))).astype(np.float32),
            (0.1 * random.standard_normal((pair.B.shape[0], 40))).astype(np.float32),
        )
        for name, pair in start.pairs.items()
    }
    state = AdapterState(wide, start.scaling, start.own_scalings)
    assert len({state.scaling_of(name) for name in wide}) == 3

    def logits(model: torch.nn.Module) -> torch.Tensor:
        model.eval()
        with torch.inference_mode():
            found: torch.Tensor = model(input_ids=torch.tensor([EXAMPLES[0].token_ids])).logits
        return found

    untouched = logits(base.model)
    with carrying(base, lora, state) as model:
        expected = logits(model)
    folder = export_adapter(state, tmp_path / "adapter", lora=lora, base_name="tiny")

    loaded = PeftModel.from_pretrained(base.model, str(folder))
    try:
        found = logits(loaded)
    finally:
        loaded.unload()
    assert float((expected - untouched).abs().max()) > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_every_reader_scales_the_export_by_one(tmp_path: Path) -> None:
    """alpha = rank, no rsLoRA, no patterns; B carries the scaling of 2."""
    lora = LoraSection(rank=3, alpha=6.0, use_rslora=True, dropout=0.5)
    state = random_adapter(0, rank=3, scaling=2.0)
    folder = export_adapter(state, tmp_path / "adapter", lora=lora, base_name="org/base")
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3.0, False)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert (config["lora_dropout"], config["inference_mode"]) == (0.0, True)
    assert config["base_model_name_or_path"] == "org/base"
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, array in state.tensors().items():
        factor = 2.0 if "lora_B" in name else 1.0
        np.testing.assert_allclose(tensors[name], factor * array, rtol=1e-6)
        assert tensors[name].dtype == np.float32
    assert set(tensors) == set(state.tensors())


def test_the_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "adapter"
    lora = LoraSection(rank=3, alpha=6.0)
    export_adapter(random_adapter(0, rank=3), folder, lora=lora, base_name="tiny")
    (folder / "adapter_model.bin").write_bytes(b"of an earlier export")
    newer = random_adapter(1, rank=3, scaling=1.0)
    export_adapter(newer, folder, lora=lora, base_name="tiny")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["adapter"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    tensors = load_file(folder / "adapter_model.safetensors")
    np.testing.assert_array_equal(
        tensors[next(iter(tensors))], newer.tensors()[next(iter(tensors))]
    )
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_a_full_disk_leaves_the_earlier_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapter"
    lora = LoraSection(rank=3, alpha=6.0)
    export_adapter(random_adapter(0, rank=3), folder, lora=lora, base_name="tiny")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def no_space(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            export_adapter(random_adapter(1, rank=3), folder, lora=lora, base_name="tiny")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
