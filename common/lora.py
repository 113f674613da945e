"""LoRA on a base model: lend it with fresh layers, read and write the adapter, take them off again.

One quantised base serves every adapter of a process. What is trained is PEFT's "default" adapter; ranks that
are sent along and not trained are a second one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from common.adapter import AdapterShape, AdapterState, adapter_shape_of, state_from_tensors
from common.config import LoraSection, TrainedFactors
from common.errors import ModelError
from common.frozen_part import UNTRAINED
from common.model import BaseModel

# PEFT's names for the adapter that is trained and for one beside it that is not.
_TRAINED, _FROZEN = "default", "frozen"


def adapter_shape(base: BaseModel, lora: LoraSection, *, rank: int | None = None) -> AdapterShape:
    """Return what an adapter for this base and LoRA setting looks like.

    rank: another rank than lora.rank, for a site that can hold less.
    Raises ModelError when no module matches or the rank is above a layer's smaller side.
    """
    with attached(base, lora, rank=rank) as model:
        return shape_of(model, lora, rank or lora.rank)


def initial_adapter(base: BaseModel, lora: LoraSection, *, seed: int) -> AdapterState:
    """Return PEFT's initial adapter (A random, B zero), the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with attached(base, lora) as model:
            return read_adapter(model, lora, rank=lora.rank)


@contextmanager
def attached(
    base: BaseModel,
    lora: LoraSection,
    *,
    rank: int | None = None,
    trained_factors: TrainedFactors = "both",
    frozen: AdapterState | None = None,
) -> Iterator[nn.Module]:
    """Lend the base with fresh LoRA layers, float32, the only trainable parameters; take them off.

    rank: another rank than lora.rank, for a site that can hold less. trained_factors: the factors that are
    trainable. frozen: an adapter of any rank that the forward pass adds, and that nothing trains.
    Yields a peft.PeftModel. Raises ModelError when the LoRA setting or `frozen` does not fit the base.
    """
    check_targets(base, lora, rank=rank or lora.rank)
    with _lent(base, peft_config(lora, rank=rank)) as model:
        if frozen is not None:
            _add_frozen(model, lora, frozen)
        untrained = UNTRAINED[trained_factors]
        for name, parameter in model.named_parameters():
            if untrained is not None and untrained in name:
                parameter.requires_grad_(False)
        yield model


@contextmanager
def carrying(base: BaseModel, lora: LoraSection, state: AdapterState) -> Iterator[nn.Module]:
    """Lend the base with an adapter written into it that nobody trains; take it off.

    state: its rank, which no layer limits, and its scalings are its own; its modules those of `lora`.
    Raises ModelError when they are others.
    """
    with _lent(base, unscaled_config(lora, rank=state.rank)) as model:
        model.requires_grad_(False)
        write_adapter(model, state.unscaled())
        yield model


@contextmanager
def _lent(base: BaseModel, config: Any) -> Iterator[Any]:
    from peft import get_peft_model

    if any(".lora_A." in name for name, _ in base.model.named_modules()):
        raise ModelError("this base already carries an adapter; one is lent at a time")
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 a deprecated question, and says what it does for Conv1D.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        peft_model: Any = get_peft_model(base.model, config, autocast_adapter_dtype=True)
    try:
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        yield peft_model
    finally:
        peft_model.unload()
        base.model.requires_grad_(False)
        for leftover in ("peft_config", "_hf_peft_config_loaded"):
            if leftover in vars(base.model):
                delattr(base.model, leftover)


def _add_frozen(model: Any, lora: LoraSection, state: AdapterState) -> None:
    config = unscaled_config(lora, rank=state.rank)
    # By name: "all-linear" would find the layers of the first adapter too.
    config.target_modules = set(state.pairs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        model.add_adapter(_FROZEN, config, autocast_adapter_dtype=True)
    model.base_model.set_adapter([_TRAINED, _FROZEN])
    parameters = _lora_parameters(model, _FROZEN)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.float()
    _write(parameters, state.unscaled())


def peft_config(lora: LoraSection, *, rank: int | None = None) -> Any:
    """Return PEFT's LoraConfig for a LoRA setting, optionally at another rank."""
    from peft import LoraConfig

    targets = lora.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank or lora.rank,
        lora_alpha=lora.alpha,
        # A pattern of PEFT's is a regular expression, in which a dot is any character.
        alpha_pattern={re.escape(ending): alpha for ending, alpha in lora.alphas.items()},
        lora_dropout=lora.dropout,
        target_modules=(
            targets if targets == "all-linear" else [t.strip() for t in targets.split(",")]
        ),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        bias="none",
    )


def unscaled_config(lora: LoraSection, *, rank: int) -> Any:
    """Return PEFT's LoraConfig of the same modules for an adapter that every reader scales by exactly 1."""
    plain = {"alpha": float(rank), "alpha_pattern": "", "use_rslora": False, "dropout": 0.0}
    return peft_config(lora.model_copy(update=plain), rank=rank)


def check_targets(base: BaseModel, lora: LoraSection, *, rank: int) -> None:
    """Raise ModelError when no layer matches, or the rank is larger than a layer."""
    layers = _linear_layers(base.model)
    if lora.target_modules != "all-linear":
        wanted = [target.strip() for target in lora.target_modules.split(",")]
        unmatched = [t for t in wanted if not any(n.split(".")[-1] == t for n in layers)]
        if unmatched:
            found = sorted({name.split(".")[-1] for name in layers})
            raise ModelError(
                f"lora.target-modules {unmatched} match no layer; this model has {found}"
            )
        layers = {n: s for n, s in layers.items() if n.split(".")[-1] in wanted}
    for ending in lora.alphas:
        if not any(name == ending or name.endswith(f".{ending}") for name in layers):
            raise ModelError(
                f"lora.alpha-pattern names {ending!r}, and no layer that is trained is called so; the "
                f"trained ones end in {sorted({name.split('.')[-1] for name in layers})}"
            )
    for name, (d_out, d_in) in layers.items():
        if rank > min(d_out, d_in):
            raise ModelError(
                f"lora.rank = {rank} is larger than layer {name} ({d_out} x {d_in}); "
                f"use at most {min(d_out, d_in)}"
            )


def read_adapter(model: nn.Module, lora: LoraSection, *, rank: int) -> AdapterState:
    """Return a copy of the adapter on a lent model, float32, on the CPU; a frozen one beside it stays."""
    tensors = {
        name: parameter.detach().to("cpu", torch.float32).numpy().copy()
        for name, parameter in _lora_parameters(model).items()
    }
    return state_from_tensors(tensors, shape=shape_of(model, lora, rank))


def write_adapter(model: nn.Module, state: AdapterState) -> None:
    """Copy an adapter into a lent model in place. Raises ModelError when it does not fit."""
    _write(_lora_parameters(model), state)


def _write(parameters: dict[str, nn.Parameter], state: AdapterState) -> None:
    tensors = state.tensors()
    if set(parameters) != set(tensors):
        raise ModelError("the adapter's modules are not those of the model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = torch.from_numpy(tensors[name].copy())
            if value.shape != parameter.shape:
                raise ModelError(
                    f"{name}: adapter {tuple(value.shape)}, model {tuple(parameter.shape)}"
                )
            parameter.copy_(value)


def _lora_parameters(model: nn.Module, adapter: str = _TRAINED) -> dict[str, nn.Parameter]:
    """The factors of one adapter on a model, by their names on the wire."""
    ending = f".{adapter}.weight"
    return {
        name.removeprefix("_module.").removesuffix(ending) + ".weight": parameter
        for name, parameter in model.named_parameters()
        if name.endswith((f".lora_A{ending}", f".lora_B{ending}"))
    }


def shape_of(model: nn.Module, lora: LoraSection, rank: int) -> AdapterShape:
    """Return what the adapter on a lent model looks like."""
    sides: dict[str, dict[str, int]] = {}
    for name, parameter in _lora_parameters(model).items():
        module, factor = name.removeprefix("base_model.model.").split(".lora_")
        sides.setdefault(module, {})[factor[0]] = parameter.shape[1 if factor[0] == "A" else 0]
    modules = {name: (side["B"], side["A"]) for name, side in sides.items()}
    return adapter_shape_of(modules, rank=rank, lora=lora)


def _linear_layers(model: Any) -> dict[str, tuple[int, int]]:
    """Module name -> (d_out, d_in) of the layers that "all-linear" means, output head left out."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear):
            layers[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            layers[name] = (int(module.nf), int(module.nx))
    return layers
