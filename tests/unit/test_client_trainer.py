"""The local loop: every model family, schedule over the whole run, accumulation, checkpointing."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from client.optimizer import make_optimizer
from client.trainer import DpSettings, TrainResult, train
from common.adapter import AdapterState
from common.config import LoraSection, ModelSection, TrainSection
from common.errors import ConfigError, ModelError, PolicyError, PrivacyError, TrainingError
from common.lora import attached, initial_adapter, read_adapter, write_adapter
from common.model import BaseModel, load_base, release_base
from common.prompts import Examples
from common.schedule import scheduled_rate
from tests.unit.tiny import CONFIGS, make_examples, tiny_base

LORA = LoraSection(rank=4, alpha=8.0)
# Of nine records or four patients one at least is drawn, but for once in 10^8 steps.
DP = DpSettings(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.99)
PATIENT_DP = replace(DP, max_records_per_patient=3)
PATIENTS = [[0, 3, 4], [1], [2, 5], [6, 7, 8]]
PLAIN = TrainSection(rounds=2, local_steps=3, batch_size=4, micro_batch_size=4, learning_rate=1e-2)


def _train(
    base: BaseModel,
    settings: TrainSection,
    *,
    dp: DpSettings | None = None,
    server_round: int = 1,
    stream: str = "north",
    patients: list[list[int]] | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> tuple[TrainResult, AdapterState]:
    start = initial_adapter_of(base)
    with attached(base, LORA) as model:
        write_adapter(model, start)
        result = train(
            model,
            Examples(make_examples(9, lengths=(6, 14, 9, 20))),
            settings=settings,
            server_round=server_round,
            stream=stream,
            pad_id=0,
            device=base.device,
            dp=dp,
            patients=patients,
            on_step=on_step,
        )
        return result, read_adapter(model, LORA, rank=4)


def initial_adapter_of(base: BaseModel) -> AdapterState:
    return initial_adapter(base, LORA, seed=0)


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_dp_step_moves_the_adapter_of_every_family(family: str, checkpointing: bool) -> None:
    base = tiny_base(family)
    settings = TrainSection(
        rounds=1,
        local_steps=1,
        batch_size=4,
        micro_batch_size=2,
        gradient_checkpointing=checkpointing,
    )

    result, after = _train(base, settings, dp=DP)

    assert math.isfinite(result.mean_loss)
    assert after.is_finite()
    before = initial_adapter_of(base)
    assert all((after.pairs[name].B != pair.B).any() for name, pair in before.pairs.items()), (
        "every module's B moves"
    )


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_loads_from_a_folder_and_takes_a_dp_step(
    family: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    for tokenizer_file in tiny_model_dir.glob("*token*"):
        shutil.copy(tokenizer_file, tmp_path)
    tiny_base(family).model.save_pretrained(tmp_path)
    quantization: Literal["nf4", "none"] = "nf4"
    if family == "falcon":
        # transformers quantises plain Linear layers only, and Falcon's are of its own kind.
        with pytest.raises(ModelError, match=r"no layer of this model.*FalconLinear.*'none'"):
            load_base(tmp_path, ModelSection(quantization="nf4"), device=torch.device("cpu"))
        quantization = "none"
    section = ModelSection(quantization=quantization)
    base = load_base(tmp_path, section, device=torch.device("cpu"))
    found = any(isinstance(module, Linear4bit) for module in base.model.modules())
    assert found == (quantization == "nf4")

    result, after = _train(base, PLAIN.model_copy(update={"local_steps": 1}), dp=DP)

    assert math.isfinite(result.mean_loss)
    assert after.is_finite()
    assert after.digest() != initial_adapter_of(base).digest()
    release_base()


def test_the_same_seed_trains_the_same_adapter_without_dp_and_another_with() -> None:
    base = tiny_base("llama")

    assert _train(base, PLAIN)[1].digest() == _train(base, PLAIN)[1].digest()
    assert _train(base, PLAIN)[1].digest() != _train(base, PLAIN, stream="south")[1].digest()
    assert _train(base, PLAIN, dp=DP)[1].digest() != _train(base, PLAIN, dp=DP)[1].digest()


def test_training_without_dp_lowers_the_loss() -> None:
    base = tiny_base("llama")
    settings = PLAIN.model_copy(update={"local_steps": 40, "rounds": 1, "schedule": "constant"})

    first, _ = _train(base, settings.model_copy(update={"local_steps": 1}))
    many, _ = _train(base, settings)

    assert many.mean_loss < first.mean_loss - 0.3


@pytest.mark.parametrize("dp", [None, DpSettings(1e-9, 0.5, 1.0)])
def test_micro_batches_and_checkpointing_do_not_change_the_result(dp: DpSettings | None) -> None:
    base = tiny_base("llama")
    settings = PLAIN.model_copy(update={"optimizer": "sgd", "learning_rate": 0.1})

    whole = _train(base, settings, dp=dp)[1]
    pieces = _train(base, settings.model_copy(update={"micro_batch_size": 1}), dp=dp)[1]
    recomputed = _train(base, settings.model_copy(update={"gradient_checkpointing": True}), dp=dp)[
        1
    ]

    for name, pair in whole.pairs.items():
        for other in (pieces, recomputed):
            torch.testing.assert_close(
                torch.from_numpy(pair.B), torch.from_numpy(other.pairs[name].B), atol=1e-6, rtol=0
            )


def test_the_schedule_runs_over_the_whole_run() -> None:
    settings = TrainSection(
        rounds=4, local_steps=5, learning_rate=1.0, warmup_ratio=0.1, schedule="linear"
    )
    rates = [scheduled_rate(step, total_steps=20, settings=settings) for step in range(20)]

    # ceil(0.1 * 20) = 2 steps up, then 18 steps down to just above 0.
    assert rates[0] == 0.5
    assert rates[1] == 1.0
    assert rates[2] == 1.0
    assert rates[11] == pytest.approx(0.5)
    assert rates[19] == pytest.approx(1 / 18)
    constant = settings.model_copy(update={"schedule": "constant"})
    assert scheduled_rate(19, total_steps=20, settings=constant) == 1.0


def test_a_later_round_trains_at_a_later_rate() -> None:
    """SGD moves in proportion to the rate: round 2 of 2 moves less than round 1."""
    base = tiny_base("llama")
    settings = TrainSection(
        rounds=2, local_steps=1, batch_size=4, learning_rate=0.1, optimizer="sgd", warmup_ratio=0.0
    )

    def distance(server_round: int) -> float:
        _, after = _train(base, settings, server_round=server_round)
        return float(sum(abs(pair.B).sum() for pair in after.pairs.values()))

    # Rates 0.1 and 0.05; the batches differ, so that the ratio is only near 2.
    assert 1.4 < distance(1) / distance(2) < 2.9


def test_no_examples_and_a_rate_that_moves_nothing_are_errors() -> None:
    base = tiny_base("llama")
    with attached(base, LORA) as model, pytest.raises(TrainingError, match="no examples"):
        train(
            model, Examples([]), settings=PLAIN, server_round=1, stream="n", pad_id=0,
            device=base.device, dp=None,
        )  # fmt: skip
    with pytest.raises(TrainingError, match="did not move"):
        _train(base, PLAIN.model_copy(update={"learning_rate": 1e-45, "optimizer": "sgd"}))


def test_divergence_is_an_error() -> None:
    base = tiny_base("llama")

    with pytest.raises(TrainingError, match="not finite"):
        _train(base, PLAIN.model_copy(update={"learning_rate": 1e38, "optimizer": "sgd"}))


def test_paged_adamw_on_a_cpu_says_what_to_do() -> None:
    base = tiny_base("llama")
    settings = PLAIN.model_copy(update={"optimizer": "paged-adamw-8bit"})

    with (
        attached(base, LORA) as model,
        pytest.raises(ConfigError, match=r"needs CUDA.*use 'adamw'"),
    ):
        make_optimizer(model, settings, device=torch.device("cpu"))


@pytest.mark.parametrize("dp", [None, DP, PATIENT_DP], ids=["plain", "record", "patient"])
@pytest.mark.parametrize("last_step", [3, 2])
def test_the_base_is_as_before_however_training_ends(dp: DpSettings | None, last_step: int) -> None:
    """What on_step raises (a site's policy on hours) stops the training there and then."""
    base = tiny_base("llama")
    untouched = {name: value.clone() for name, value in base.model.state_dict().items()}
    steps: list[int] = []

    def on_step(step: int) -> None:
        steps.append(step)
        if step == last_step < 3:
            raise PolicyError("policy.max-hours = 1: stopped")

    outcome = (
        nullcontext() if last_step == 3 else pytest.raises(PolicyError, match=r"policy\.max-hours")
    )
    with outcome:
        _train(
            base,
            PLAIN.model_copy(update={"gradient_checkpointing": True}),
            dp=dp,
            patients=PATIENTS if dp is PATIENT_DP else None,
            on_step=on_step,
        )

    assert steps == list(range(1, last_step + 1))
    model = base.model
    assert not model.is_gradient_checkpointing
    assert not model.training
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert model.state_dict().keys() == untouched.keys()
    assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())


def test_patients_train_like_records_and_every_one_of_a_patients_records_is_seen() -> None:
    base = tiny_base("llama")
    settings = PLAIN.model_copy(update={"micro_batch_size": 3})

    result, after = _train(base, settings, dp=PATIENT_DP, patients=PATIENTS)

    assert math.isfinite(result.mean_loss)
    assert after.digest() != initial_adapter_of(base).digest()


def test_a_model_that_mixes_records_is_refused_under_dp() -> None:
    base = tiny_base("llama")
    mlp = base.model.model.layers[0].mlp  # type: ignore[union-attr,operator,index]
    inner = mlp.forward

    def flattened(states: torch.Tensor) -> torch.Tensor:
        whole: torch.Tensor = inner(states.flatten(0, 1)).view_as(states)
        return whole

    mlp.forward = flattened

    _train(base, PLAIN)
    with pytest.raises(PrivacyError, match="mixes records"):
        _train(base, PLAIN, dp=replace(DP, sample_rate=1.0))


def test_under_dp_dropouts_masks_come_from_the_operating_systems_entropy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever could foresee them by train.seed could undo them."""

    def mask_seeds(first_byte: int, seed: int, dp: DpSettings | None) -> int:
        base = tiny_base("llama")
        with attached(base, LORA) as model, monkeypatch.context() as watched:
            seeds: list[int] = []
            watched.setattr(torch, "manual_seed", seeds.append)
            train(
                model, Examples(make_examples(8, lengths=(5,))), server_round=1, stream="n",
                settings=PLAIN.model_copy(update={"seed": seed}), pad_id=0, device=base.device,
                dp=dp, entropy=lambda size: bytes([first_byte] * size),
            )  # fmt: skip
        return seeds[0]

    assert mask_seeds(1, 0, DP) == mask_seeds(1, 7, DP)
    assert mask_seeds(1, 0, DP) != mask_seeds(2, 0, DP)
    assert mask_seeds(1, 0, None) != mask_seeds(1, 7, None)
