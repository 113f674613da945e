"""What an adapter for a base model will look like and weigh, before any weight is loaded.

The model is built on torch's meta device from its folder's config.json, and the adapter is put on it as it
would be for training.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from common.adapter import AdapterShape
from common.config import LoraSection
from common.errors import ModelError
from common.lora import adapter_shape
from common.model import BaseModel


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A base model and an adapter on it, as they will be. digest: `digest_model` of its folder."""

    digest: str
    shape: AdapterShape
    num_parameters: int


def planned_model(folder: Path, digest: str, lora: LoraSection, *, rank: int) -> PlannedModel:
    """Return what an adapter for a model folder will look like, without loading the model.

    digest: of the folder. rank: that which this site would train at.
    Raises ModelError when the folder holds no usable config.json or the LoRA setting does not fit.
    """
    return _planned_model(str(folder), digest, lora, rank)


@lru_cache(maxsize=16)
def _planned_model(folder: str, digest: str, lora: LoraSection, rank: int) -> PlannedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"model folder {folder} describes no model that can be built ({type(error).__name__}); "
            "copy the coordinator's model folder again"
        ) from None
    model.requires_grad_(False)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    base = BaseModel(model, None, digest, torch.device("meta"))
    with torch.device("meta"):
        return PlannedModel(digest, adapter_shape(base, lora, rank=rank), num_parameters)
