"""What an adapter will look like and weigh: exact before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common.config import LoraSection, RunConfig
from common.errors import ModelError
from common.lora import adapter_shape, attached, read_adapter
from common.model import load_base
from common.model_folder import digest_model
from common.planned_model import planned_model
from simulations.embedded import embedded_model_dir
from tests.unit.tiny import CONFIGS, tiny_base


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("rank", [1, 4])
def test_an_adapters_size_is_known_to_the_byte_from_config_json_alone(
    tmp_path: Path, family: str, rank: int
) -> None:
    CONFIGS[family]().save_pretrained(tmp_path)
    base, lora = tiny_base(family), LoraSection(rank=4)

    planned = planned_model(tmp_path, f"{family}", lora, rank=rank)

    with attached(base, lora, rank=rank) as model:
        real = read_adapter(model, lora, rank=rank)
    assert planned.shape == adapter_shape(base, lora, rank=rank)
    assert planned.shape.safetensors_size() == len(real.to_safetensors())
    assert planned.num_parameters == sum(p.numel() for p in base.model.parameters())


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_so_it_is_for_the_embedded_model_however_it_is_quantised(quantization: str) -> None:
    folder, run = embedded_model_dir(), RunConfig.parse({"model.quantization": quantization})
    base = load_base(folder, run.model, device=torch.device("cpu"))

    planned = planned_model(folder, digest_model(folder), run.lora, rank=8)

    with attached(base, run.lora) as model:
        real = read_adapter(model, run.lora, rank=8)
    assert planned.shape == adapter_shape(base, run.lora)
    assert planned.shape.safetensors_size() == len(real.to_safetensors())


def test_modules_asked_for_by_name_are_planned_as_they_will_be(tiny_model_dir: Path) -> None:
    lora = LoraSection(rank=2, target_modules="q_proj,v_proj")

    planned = planned_model(tiny_model_dir, "tiny", lora, rank=2)

    assert {name.split(".")[-1] for name in planned.shape.modules} == {"q_proj", "v_proj"}


def test_planning_reads_no_weights(tmp_path: Path, tiny_model_dir: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())

    planned_model(tmp_path, "no weights here", LoraSection(rank=2), rank=2)


def test_what_does_not_fit_the_model_is_said_before_it_is_loaded(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    with pytest.raises(ModelError, match=r"lora.rank = 4096 is larger than layer"):
        planned_model(tiny_model_dir, "tiny", LoraSection(rank=4096), rank=4096)
    with pytest.raises(ModelError, match=r"\['nothing'\] match no layer"):
        planned_model(tiny_model_dir, "tiny", LoraSection(target_modules="nothing"), rank=1)
    with pytest.raises(ModelError, match="describes no model that can be built"):
        planned_model(tmp_path, "empty", LoraSection(), rank=1)


def test_a_folder_that_brings_code_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}})
    )
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")

    with pytest.raises(ModelError, match="describes no model"):
        planned_model(tmp_path, "own", LoraSection(), rank=1)
