"""LoRA on a base model: how it is lent with an adapter, what of it is trained, and how it comes back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.adapter import AdapterShape, AdapterState, LoraPair
from common.config import LoraSection, ModelSection, TrainedFactors
from common.errors import ModelError
from common.lora import (
    adapter_shape,
    attached,
    carrying,
    check_targets,
    initial_adapter,
    peft_config,
    read_adapter,
    write_adapter,
)
from common.model import BaseModel, choose_device, load_base
from common.model_folder import digest_model
from tests.unit.tiny import LLAMA_SIDES

CPU = torch.device("cpu")
LORA = LoraSection(rank=4, alpha=8.0)
IDS = torch.tensor([[1, 70, 80, 90, 100, 2]])


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


def test_shape_names_every_linear_layer_but_the_head(base: BaseModel) -> None:
    shape = adapter_shape(base, LORA)

    assert shape.modules == {
        f"model.layers.{layer}.{name}": sides
        for layer in (0, 1)
        for name, sides in LLAMA_SIDES.items()
    }
    assert (shape.rank, shape.scaling) == (4, 2.0)


def test_shape_at_another_rank_and_for_named_modules(plain: BaseModel) -> None:
    lora = LoraSection(rank=4, alpha=8.0, target_modules="q_proj, v_proj", use_rslora=True)

    shape = adapter_shape(plain, lora, rank=16)

    assert {name.split(".")[-1] for name in shape.modules} == {"q_proj", "v_proj"}
    assert (len(shape.modules), shape.rank, shape.scaling) == (4, 16, 2.0)


@pytest.mark.parametrize(("targets", "rank"), [("all-linear", 17), ("q_proj", 33)])
def test_rank_larger_than_a_layer_is_refused(plain: BaseModel, targets: str, rank: int) -> None:
    lora = LoraSection(rank=rank, target_modules=targets)

    with pytest.raises(ModelError, match=rf"lora.rank = {rank} is larger .* at most {rank - 1}"):
        adapter_shape(plain, lora)
    check_targets(plain, lora, rank=rank - 1)


def test_unknown_target_is_refused_naming_those_that_exist(plain: BaseModel) -> None:
    lora = LoraSection(target_modules="q_proj,query")

    with pytest.raises(
        ModelError, match=r"\['query'\] match no layer; this model has \['down_proj', .*'v_proj'\]"
    ):
        initial_adapter(plain, lora, seed=0)


def test_output_head_is_no_target(plain: BaseModel) -> None:
    with pytest.raises(ModelError, match=r"\['lm_head'\] match no layer"):
        adapter_shape(plain, LoraSection(target_modules="lm_head"))


def test_peft_config_trains_no_bias_and_takes_the_rank_it_is_given() -> None:
    config = peft_config(LORA, rank=2)

    assert (config.r, config.lora_alpha, config.bias) == (2, 8.0, "none")
    assert peft_config(LORA).r == 4


# Lending


def test_base_comes_back_exactly_as_it_was_lent(base: BaseModel) -> None:
    modules = [(name, type(module)) for name, module in base.model.named_modules()]
    attributes = set(vars(base.model))
    before = _logits(base.model)

    for rank in (4, 2):
        with attached(base, LORA, rank=rank) as model:
            names = {n: p for n, p in model.named_parameters() if p.requires_grad}
            assert len(names) == 2 * 2 * len(LLAMA_SIDES)
            assert all(".lora_" in name for name in names)
            assert {p.dtype for p in names.values()} == {torch.float32}
            with torch.no_grad():
                for parameter in names.values():
                    parameter.fill_(0.3)
            assert read_adapter(model, LORA, rank=rank).rank == rank
            assert not torch.equal(_logits(model), before)

        assert torch.equal(_logits(base.model), before)
        assert not any(parameter.requires_grad for parameter in base.model.parameters())
        assert [(name, type(module)) for name, module in base.model.named_modules()] == modules
        assert set(vars(base.model)) == attributes


def test_base_comes_back_after_a_failure_too(plain: BaseModel) -> None:
    before = _logits(plain.model)

    with pytest.raises(ValueError, match="training failed"), attached(plain, LORA):
        raise ValueError("training failed")

    assert torch.equal(_logits(plain.model), before)
    assert not any(".lora_" in name for name, _ in plain.model.named_parameters())


def test_dora_comes_off_again(plain: BaseModel) -> None:
    before = _logits(plain.model)

    with attached(plain, LoraSection(rank=2, use_dora=True)) as model:
        assert any("magnitude" in name for name, _ in model.named_parameters())

    assert torch.equal(_logits(plain.model), before)


def test_initial_adapter_changes_nothing_and_can_learn(plain: BaseModel) -> None:
    state = initial_adapter(plain, LORA, seed=3)

    assert all(not pair.B.any() for pair in state.pairs.values())
    assert all(pair.A.all() for pair in state.pairs.values())
    with attached(plain, LORA) as model:
        write_adapter(model, state)
        lent = _logits(model)
    assert torch.equal(lent, _logits(plain.model))


def test_initial_adapter_depends_on_the_seed_alone(plain: BaseModel) -> None:
    torch.manual_seed(1)
    first = initial_adapter(plain, LORA, seed=3)
    torch.manual_seed(2)
    stream = torch.get_rng_state()

    assert initial_adapter(plain, LORA, seed=3).digest() == first.digest()
    assert initial_adapter(plain, LORA, seed=4).digest() != first.digest()
    assert torch.equal(torch.get_rng_state(), stream)


def _random_like(state: AdapterState, *, own: AdapterShape | None = None) -> AdapterState:
    """own: where the scalings of single modules are taken from."""
    random = np.random.default_rng(0)
    return AdapterState(
        {
            name: LoraPair(
                random.standard_normal(pair.A.shape, np.float32),
                random.standard_normal(pair.B.shape, np.float32),
            )
            for name, pair in state.pairs.items()
        },
        state.scaling,
        {} if own is None else own.own_scalings,
    )


def test_written_adapter_reads_back_bit_for_bit(base: BaseModel) -> None:
    state = _random_like(initial_adapter(base, LORA, seed=0))

    with attached(base, LORA) as model:
        write_adapter(model, state)
        found = read_adapter(model, LORA, rank=4)

    assert found.digest() == state.digest()
    assert found.scaling == state.scaling == 2.0


def test_adapter_that_is_read_is_a_copy(plain: BaseModel) -> None:
    with attached(plain, LORA) as model:
        state = read_adapter(model, LORA, rank=4)
        digest = state.digest()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1)
        assert read_adapter(model, LORA, rank=4).digest() != digest

    assert state.digest() == digest


def test_written_adapter_adds_scaling_times_b_a(plain: BaseModel) -> None:
    lora = LoraSection(rank=4, alpha=8.0, target_modules="q_proj")
    state = _random_like(initial_adapter(plain, lora, seed=0))
    name = "model.layers.0.self_attn.q_proj"
    layer = plain.model.get_submodule(name)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        expected = (
            layer(x) + 2.0 * x @ torch.from_numpy(state.pairs[name].B @ state.pairs[name].A).T
        )
        with attached(plain, lora) as model:
            write_adapter(model, state)
            found = model.get_submodule(f"base_model.model.{name}")(x)

    assert torch.allclose(found, expected, atol=1e-4)


def test_adapter_that_does_not_fit_is_not_written(plain: BaseModel) -> None:
    state = initial_adapter(plain, LORA, seed=0)
    fewer = AdapterState(dict(list(state.pairs.items())[:-1]), state.scaling)

    with attached(plain, LORA, rank=2) as model:
        with pytest.raises(ModelError, match="modules are not those of the model"):
            write_adapter(model, fewer)
        with pytest.raises(ModelError, match=r"adapter \(4, 32\), model \(2, 32\)"):
            write_adapter(model, state)


@pytest.mark.parametrize(("trained", "factor"), [("a", "A"), ("b", "B")])
def test_one_factor_alone_can_be_made_trainable(
    base: BaseModel, trained: TrainedFactors, factor: str
) -> None:
    with attached(base, LORA, trained_factors=trained) as model:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(names) == 2 * len(LLAMA_SIDES)
        assert all(f".lora_{factor}.default." in name for name in names)
        assert read_adapter(model, LORA, rank=4).rank == 4


def _frozen_like(state: AdapterState, *, rank: int) -> AdapterState:
    """A small random adapter of another rank, scaled by 3, and by 0.5 in its first module."""
    random = np.random.default_rng(7)
    pairs = {
        name: LoraPair(
            (0.1 * random.standard_normal((rank, pair.A.shape[1]))).astype(np.float32),
            (0.1 * random.standard_normal((pair.B.shape[0], rank))).astype(np.float32),
        )
        for name, pair in state.pairs.items()
    }
    return AdapterState(pairs, 3.0, {next(iter(pairs)): 0.5})


@pytest.mark.parametrize("rank", [1, 40])
def test_a_frozen_adapter_adds_its_update_and_is_neither_trained_nor_read(
    base: BaseModel, rank: int
) -> None:
    """Rank 40 is above the smaller side of every layer that has one of 16 or 32."""
    modules = [(name, type(module)) for name, module in base.model.named_modules()]
    untouched, attributes = _logits(base.model), set(vars(base.model))
    state = _random_like(initial_adapter(base, LORA, seed=0))
    frozen = _frozen_like(state, rank=rank)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))

    with attached(base, LORA, frozen=frozen) as model:
        write_adapter(model, state)
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(trainable) == 2 * 2 * len(LLAMA_SIDES)
        assert not any("frozen" in name for name in trainable)
        kept = {n: p for n, p in model.named_parameters() if ".frozen." in n}
        assert len(kept) == len(trainable)
        assert {p.dtype for p in kept.values()} == {torch.float32}
        assert read_adapter(model, LORA, rank=4).digest() == state.digest()
        with torch.no_grad():
            for name, pair in frozen.pairs.items():
                layer = model.get_submodule(f"base_model.model.{name}")
                inputs = x[:, : pair.A.shape[1]]
                trained = (
                    2.0 * inputs @ torch.from_numpy(state.pairs[name].B @ state.pairs[name].A).T
                )
                beside = inputs @ torch.from_numpy(frozen.scaling_of(name) * pair.B @ pair.A).T
                assert float(beside.norm()) > 0.1
                found = layer(inputs) - layer.base_layer(inputs) - trained  # type: ignore[operator]
                torch.testing.assert_close(found, beside, rtol=0, atol=2e-4)

    assert torch.equal(_logits(base.model), untouched)
    assert [(name, type(module)) for name, module in base.model.named_modules()] == modules
    assert set(vars(base.model)) == attributes


def test_a_frozen_adapter_of_other_modules_is_refused(plain: BaseModel) -> None:
    state = initial_adapter(plain, LoraSection(rank=2, target_modules="q_proj"), seed=0)
    wrong = AdapterState(
        {name: LoraPair(pair.A[:, :3], pair.B) for name, pair in state.pairs.items()}, 1.0
    )
    with (
        pytest.raises(ModelError, match=r"adapter \(2, 3\), model \(2, 32\)"),
        attached(plain, LORA, frozen=wrong),
    ):
        pass
    assert not any(".lora_" in name for name, _ in plain.model.named_parameters())


@pytest.mark.parametrize("rank", [1, 40])
def test_a_carried_adapter_has_its_own_rank_and_scalings_and_trains_nothing(
    base: BaseModel, rank: int
) -> None:
    """It is the same model as one with that adapter frozen beside one that adds nothing."""
    start = initial_adapter(base, LORA, seed=0)
    state = _frozen_like(start, rank=rank)
    with attached(base, LORA, frozen=state) as model:
        write_adapter(model, start)
        expected = _logits(model)

    with carrying(base, LORA, state) as model:
        assert not any(p.requires_grad for p in model.parameters())
        found = _logits(model)

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.equal(_logits(base.model), found)
    fewer = AdapterState(dict(list(state.pairs.items())[:-1]), 1.0)
    with (
        pytest.raises(ModelError, match="modules are not those of the model"),
        carrying(base, LORA, fewer),
    ):
        pass


# Alphas of single modules


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj=32, layers.0.self_attn.q_proj=8",
        "layers.0.self_attn.q_proj=8, q_proj=32",
        "1.mlp.down_proj=3, down_proj=5, v_proj=0.5, model.layers.0.self_attn.o_proj=2",
    ],
    ids=["short first", "long first", "several"],
)
def test_own_scalings_are_those_that_pefts_layers_have(
    plain: BaseModel, pattern: str, use_rslora: bool
) -> None:
    lora = LoraSection(rank=4, alpha=8.0, alpha_pattern=pattern, use_rslora=use_rslora)
    state = _random_like(initial_adapter(plain, lora, seed=0), own=adapter_shape(plain, lora))

    with attached(plain, lora) as model:
        theirs = {
            name: model.get_submodule(f"base_model.model.{name}").scaling["default"]  # type: ignore[union-attr,index]
            for name in state.pairs
        }
        write_adapter(model, state)
        found = read_adapter(model, lora, rank=4)

    assert {name: state.scaling_of(name) for name in state.pairs} == theirs
    assert len(set(theirs.values())) > 1
    assert found.digest() == state.digest()
    assert (found.scaling, dict(found.own_scalings)) == (state.scaling, dict(state.own_scalings))


def test_of_two_alphas_that_fit_a_module_the_first_counts(plain: BaseModel) -> None:
    name = "model.layers.0.self_attn.q_proj"
    short, long = "q_proj=32", "layers.0.self_attn.q_proj=8"
    for pattern, alpha in ((f"{short},{long}", 32), (f"{long},{short}", 8)):
        shape = adapter_shape(plain, LoraSection(rank=4, alpha=16.0, alpha_pattern=pattern))
        assert shape.own_scalings[name] == alpha / 4


def test_a_dot_in_an_alphas_pattern_is_a_dot() -> None:
    """To PEFT a pattern is a regular expression; ours names whole parts of a module's name."""
    from peft.utils.other import get_pattern_key

    (key,) = peft_config(LoraSection(alpha_pattern="a.b=2")).alpha_pattern

    assert get_pattern_key([key], "model.a.b") == key
    assert get_pattern_key([key], "model.a_b") != key


@pytest.mark.parametrize("ending", ["query", "proj", "layers.2.self_attn.q_proj", "lm_head"])
def test_an_alpha_for_no_trained_layer_is_refused(plain: BaseModel, ending: str) -> None:
    lora = LoraSection(rank=4, alpha_pattern=f"q_proj=4,{ending}=2")
    with pytest.raises(ModelError, match=rf"lora.alpha-pattern names '{ending}', .*'down_proj'"):
        adapter_shape(plain, lora)
    untrained = LoraSection(rank=4, target_modules="v_proj", alpha_pattern="q_proj=4")
    with pytest.raises(ModelError, match=r"names 'q_proj', .*the trained ones end in \['v_proj'\]"):
        adapter_shape(plain, untrained)


@pytest.mark.parametrize("shard", ["../stolen.safetensors", "absent.safetensors"])
def test_a_shard_that_the_digest_would_not_cover_is_refused(
    tiny_model_dir: Path, tmp_path: Path, shard: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (tmp_path / "stolen.safetensors").write_bytes(b"elsewhere")
    index = {"weight_map": {"lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(ModelError, match="which is not a file of"):
        digest_model(folder)


def test_int8_computes_each_record_alone(tiny_model_dir: Path) -> None:
    """An outlier threshold would choose columns over the whole batch, so that records mix."""
    base = load_base(tiny_model_dir, ModelSection(quantization="int8"), device=choose_device("cpu"))
    layers = [m for m in base.model.modules() if isinstance(m, bnb.nn.Linear8bitLt)]

    assert layers
    assert all(layer.state.threshold == 0.0 for layer in layers)
