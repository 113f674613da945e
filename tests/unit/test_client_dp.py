"""The laws that the guarantee rests on, against naive loops small enough to trust."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

from client.dp import add_clipped_sum, private_steps, signal_to_noise
from client.noise import Entropy
from client.trainer import DpSettings, train
from common.adapter import AdapterState, LoraPair
from common.config import LoraSection, TrainedFactors, TrainSection
from common.errors import PrivacyError
from common.lora import attached, initial_adapter, read_adapter, write_adapter
from common.metrics import record_losses
from common.model import BaseModel
from common.prompts import Example, Examples, collate
from tests.unit.tiny import make_examples, tiny_base

CPU = torch.device("cpu")
LORA = LoraSection(rank=4, alpha=8.0)
CLIP = 0.5
# So little noise that a step is the clipped sum, to float32's own precision.
NO_NOISE = 1e-12
# One step at rate 0.5, expected batch 4.
ONE_STEP = TrainSection(
    rounds=1, local_steps=1, batch_size=4, micro_batch_size=4, learning_rate=0.5, optimizer="sgd",
    schedule="constant", warmup_ratio=0.0,
)  # fmt: skip


@pytest.fixture
def base() -> BaseModel:
    return tiny_base("llama")


@pytest.fixture
def model(base: BaseModel) -> Iterator[nn.Module]:
    start = lively_adapter(base)
    with attached(base, LORA) as lent:
        write_adapter(lent, start)
        yield lent


def lively_adapter(base: BaseModel) -> AdapterState:
    """An adapter whose B is not zero, so that A has gradients too."""
    state = initial_adapter(base, LORA, seed=0)
    generator = torch.Generator().manual_seed(1)
    pairs = {
        name: LoraPair(pair.A, (0.1 * torch.randn(pair.B.shape, generator=generator)).numpy())
        for name, pair in state.pairs.items()
    }
    return AdapterState(pairs, state.scaling)


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in _parameters(model)])


def _naive_gradient(model: nn.Module, example: Example) -> torch.Tensor:
    batch = collate([example], pad_id=0, device=CPU)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    loss = record_losses(logits, batch.labels).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, _parameters(model))])


def _clipped(gradient: torch.Tensor, clip: float = CLIP) -> torch.Tensor:
    return gradient * min(1.0, clip / float(gradient.norm()))


def _trained(
    base: BaseModel,
    examples: list[Example],
    *,
    patients: list[list[int]] | None = None,
    settings: TrainSection = ONE_STEP,
    dp: DpSettings | None = None,
    **options: object,
) -> torch.Tensor:
    """The adapter after one round from the lively one, flat; every unit takes part, without noise."""
    start = lively_adapter(base)
    dp = dp or DpSettings(NO_NOISE, CLIP, 1.0, max_records_per_patient=4 if patients else 0)
    with attached(base, LORA) as model:
        write_adapter(model, start)
        train(
            model, Examples(examples), settings=settings, server_round=1, stream="site", pad_id=0,
            device=base.device, dp=dp, patients=patients, **options,  # type: ignore[arg-type]
        )  # fmt: skip
        return _flat(model)


# Records


def test_the_models_own_loss_would_tie_records_together(model: nn.Module) -> None:
    """Why `outputs.loss` is never used: a longer neighbour shrinks a record's gradient."""
    record, short, long = make_examples(3, lengths=(12, 5, 30))
    long = replace(long, num_answer=25)

    def gradient(neighbour: Example) -> torch.Tensor:
        batch = collate([record, neighbour], pad_id=0, device=CPU)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        tokens = (batch.labels[:, 1:] != -100).sum()
        own = record_losses(logits, batch.labels)[0] * (batch.labels[0, 1:] != -100).sum() / tokens
        return torch.cat([g.flatten() for g in torch.autograd.grad(own, _parameters(model))])

    assert float(gradient(short).norm()) > 2 * float(gradient(long).norm())


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
def test_a_step_equals_naive_clipping_of_each_record(
    base: BaseModel, micro_batch_size: int
) -> None:
    """theta - lr / B * sum of clipped per-record gradients."""
    examples = make_examples(5, lengths=(6, 14, 9, 22, 4))
    start = lively_adapter(base)
    with attached(base, LORA) as model:
        write_adapter(model, start)
        gradients = [_naive_gradient(model, example) for example in examples]
        expected = _flat(model) - 0.5 / 4 * torch.stack([_clipped(g) for g in gradients]).sum(dim=0)

    after = _trained(
        base, examples, settings=ONE_STEP.model_copy(update={"micro_batch_size": micro_batch_size})
    )

    assert all(float(g.norm()) > CLIP for g in gradients), "clipping is at work"
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_a_step_equals_that_of_opacuss_hooks_and_optimizer(model: nn.Module) -> None:
    examples = make_examples(4, lengths=(6, 14, 9))
    batch = collate(examples, pad_id=0, device=CPU)

    def losses(module: nn.Module) -> torch.Tensor:
        logits = module(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return record_losses(logits, batch.labels).sum()

    before = _flat(model)
    with private_steps(
        model, torch.optim.SGD(_parameters(model), lr=0.5), noise_multiplier=NO_NOISE,
        max_grad_norm=CLIP, batch_size=3,
    ) as steps:  # fmt: skip
        steps.backward(losses(model), sizes=[1, 1, 1, 1])
        steps.finish()
    ours = _flat(model)
    with torch.no_grad():
        start = before.clone()
        for parameter in _parameters(model):
            parameter.copy_(start[: parameter.numel()].view_as(parameter))
            start = start[parameter.numel() :]
    hooked = GradSampleModule(model, batch_first=True, loss_reduction="sum", strict=False)
    optimizer = DPOptimizer(
        torch.optim.SGD(_parameters(model), lr=0.5), noise_multiplier=0.0, max_grad_norm=CLIP,
        expected_batch_size=3,
    )  # fmt: skip
    model.train()
    losses(hooked).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    hooked.remove_hooks()

    assert float((ours - before).norm()) > 0.05
    torch.testing.assert_close(ours, _flat(model), rtol=0, atol=1e-6)


# Patients


@pytest.mark.parametrize("micro_batch_size", [4, 5, 16])
def test_a_step_equals_naive_clipping_of_each_patients_mean(
    base: BaseModel, micro_batch_size: int
) -> None:
    examples = make_examples(10, lengths=(6, 14, 9, 22, 4, 11))
    patients = [[7], [2, 9], [0, 3, 8], [1, 4, 5, 6]]
    start = lively_adapter(base)
    with attached(base, LORA) as model:
        write_adapter(model, start)
        means = [
            torch.stack([_naive_gradient(model, examples[i]) for i in records]).mean(dim=0)
            for records in patients
        ]
        expected = _flat(model) - 0.5 / 4 * torch.stack([_clipped(m) for m in means]).sum(dim=0)

    after = _trained(
        base,
        examples,
        patients=patients,
        settings=ONE_STEP.model_copy(update={"micro_batch_size": micro_batch_size}),
    )

    assert all(float(m.norm()) > CLIP for m in means), "clipping is at work"
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)


def test_a_patients_number_of_records_does_not_scale_its_influence(base: BaseModel) -> None:
    """Four equal records have the mean of one; below the clip a sum would be four times as long."""
    (record,) = make_examples(1, lengths=(12,))
    other = make_examples(2, lengths=(5, 9))[1]
    wide = DpSettings(NO_NOISE, 1e4, 1.0, max_records_per_patient=4)

    once = _trained(base, [record, other], patients=[[0], [1]], dp=wide)
    often = _trained(base, [record] * 4 + [other], patients=[[0, 1, 2, 3], [4]], dp=wide)

    torch.testing.assert_close(once, often, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cap", [1, 3, 8])
def test_a_patient_of_100_records_moves_the_sum_by_at_most_the_clip(
    base: BaseModel, cap: int
) -> None:
    examples = make_examples(103, lengths=(6, 12, 9))
    others = [[100], [101, 102]]
    # Rate 1 and divisor 1: the adapter moves by the sum itself.
    settings = ONE_STEP.model_copy(
        update={"batch_size": 1, "learning_rate": 1.0, "micro_batch_size": 8}
    )
    dp = DpSettings(NO_NOISE, CLIP, 1.0, max_records_per_patient=cap)
    # The others' own records are drawn the same way in both.
    entropy = _stream("fixed")

    without = _trained(base, examples, patients=others, settings=settings, dp=dp, entropy=entropy)
    with_all = _trained(
        base, examples, patients=[*others, list(range(100))], settings=settings, dp=dp,
        entropy=_stream("fixed"),
    )  # fmt: skip

    distance = float((with_all - without).norm())
    assert 0.9 * CLIP < distance <= CLIP * (1 + 1e-4)


def test_only_so_many_records_of_a_patient_are_read_and_others_each_time(base: BaseModel) -> None:
    class Watched(Examples):
        read: list[list[int]]

        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            self.read[-1].append(index)
            return super().__getitem__(index)

    examples = Watched(make_examples(50, lengths=(6,)))
    examples.read = [[]]
    start = lively_adapter(base)
    with attached(base, LORA) as model:
        write_adapter(model, start)
        train(
            model, examples, settings=ONE_STEP.model_copy(update={"local_steps": 6}),
            server_round=1, stream="site", pad_id=0, device=base.device,
            dp=DpSettings(1.0, CLIP, 1.0, max_records_per_patient=3), patients=[list(range(50))],
            on_step=lambda step: examples.read.append([]),
        )  # fmt: skip

    draws = examples.read[:6]
    assert all(len(set(draw)) == len(draw) == 3 for draw in draws)
    # Two repeats among six draws of three of fifty (one in 19,600 each pair): 1 run in five million.
    assert len({tuple(sorted(draw)) for draw in draws}) > 4


@pytest.mark.parametrize(
    ("cap", "patients"), [(0, [[0], [1]]), (2, None)], ids=["record unit", "patient unit"]
)
def test_the_unit_and_the_patients_must_agree(
    base: BaseModel, cap: int, patients: list[list[int]] | None
) -> None:
    dp = DpSettings(1.0, CLIP, 1.0, max_records_per_patient=cap)
    with pytest.raises(PrivacyError, match="both or neither"):
        _trained(base, make_examples(2, lengths=(6,)), patients=patients, dp=dp)


def test_patients_that_a_micro_batch_cannot_hold_are_refused(base: BaseModel) -> None:
    dp = DpSettings(1.0, CLIP, 1.0, max_records_per_patient=5)
    with pytest.raises(PrivacyError, match=r"max-records-per-patient = 5.*never split"):
        _trained(base, make_examples(1, lengths=(6,)), patients=[[0]], dp=dp)


def test_a_record_of_two_patients_is_refused_before_any_training(base: BaseModel) -> None:
    with pytest.raises(PrivacyError, match="listed twice"):
        _trained(base, make_examples(2, lengths=(6,)), patients=[[0, 1], [1]])


# One factor, and a frozen adapter beside it


def frozen_beside(state: AdapterState, *, rank: int) -> AdapterState:
    """A small random adapter of another rank on the same modules."""
    generator = torch.Generator().manual_seed(2)
    pairs = {
        name: LoraPair(
            (0.1 * torch.randn((rank, pair.A.shape[1]), generator=generator)).numpy(),
            (0.1 * torch.randn((pair.B.shape[0], rank), generator=generator)).numpy(),
        )
        for name, pair in state.pairs.items()
    }
    return AdapterState(pairs, 0.5)


@pytest.mark.parametrize("frozen_rank", [0, 40])
@pytest.mark.parametrize("factors", ["a", "b"])
@pytest.mark.parametrize("patients", [None, [[2], [0, 1, 3], [4]]], ids=["record", "patient"])
def test_a_step_on_one_factor_equals_naive_clipping_of_that_factors_gradient(
    base: BaseModel, factors: TrainedFactors, frozen_rank: int, patients: list[list[int]] | None
) -> None:
    """Rank 40 is above the smaller side of every layer that has one of 16 or 32."""
    examples = make_examples(5, lengths=(6, 14, 9, 22, 4))
    start = lively_adapter(base)
    frozen = frozen_beside(start, rank=frozen_rank) if frozen_rank else None
    dp = DpSettings(NO_NOISE, CLIP, 1.0, max_records_per_patient=4 if patients else 0)
    with attached(base, LORA, trained_factors=factors, frozen=frozen) as model:
        write_adapter(model, start)
        before = _flat(model)
        rows = [_naive_gradient(model, example) for example in examples]
        means = [torch.stack([rows[i] for i in unit]).mean(dim=0) for unit in patients or []]
        units = means or rows
        expected = before - 0.5 / 4 * torch.stack([_clipped(unit) for unit in units]).sum(dim=0)
        train(
            model, Examples(examples), settings=ONE_STEP, server_round=1, stream="site", pad_id=0,
            device=base.device, dp=dp, patients=patients,
        )  # fmt: skip
        after = _flat(model)

    assert len(after) == sum(
        (pair.A if factors == "a" else pair.B).size for pair in start.pairs.values()
    )
    assert all(float(unit.norm()) > CLIP for unit in units), "clipping is at work"
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("factors", ["a", "b"])
@pytest.mark.parametrize("patients", [None, [[0], [1, 2]]], ids=["record", "patient"])
def test_noise_goes_to_the_trained_factor_and_the_other_stays_bit_for_bit(
    base: BaseModel,
    factors: TrainedFactors,
    optimizer: Literal["sgd", "adamw"],
    checkpointing: bool,
    patients: list[list[int]] | None,
) -> None:
    """Weight decay too would move what is not trained."""
    settings = ONE_STEP.model_copy(
        update={
            "local_steps": 2, "optimizer": optimizer, "gradient_checkpointing": checkpointing,
            "weight_decay": 0.1,
        }
    )  # fmt: skip
    dp = DpSettings(2.0, CLIP, 0.5, max_records_per_patient=2 if patients else 0)
    start = lively_adapter(base)
    frozen = frozen_beside(start, rank=3)
    with attached(base, LORA, trained_factors=factors, frozen=frozen) as model:
        write_adapter(model, start)
        beside = {n: p.clone() for n, p in model.named_parameters() if ".frozen." in n}
        train(
            model, Examples(make_examples(3, lengths=(6, 9))), settings=settings, server_round=1,
            stream="site", pad_id=0, device=base.device, dp=dp, patients=patients,
        )  # fmt: skip
        after = read_adapter(model, LORA, rank=4)
        assert len(beside) == 4 * 7
        assert all(torch.equal(p, beside[n]) for n, p in model.named_parameters() if n in beside)

    for name, pair in start.pairs.items():
        moved = {"a": (after.pairs[name].A != pair.A), "b": (after.pairs[name].B != pair.B)}
        # Noise reaches every coordinate; one of some ten million comes back to where it was, in float32.
        assert (~moved.pop(factors)).sum() <= 1
        assert not any(other.any() for other in moved.values())


# The clipped sum


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_the_sum_is_that_of_each_units_mean_scaled_to_the_clip(
    sizes: list[int], scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = scale * torch.randn((sum(sizes), 7), generator=generator)
    expected = torch.ones(7, dtype=torch.float64)
    for unit in rows.double().split(sizes):  # type: ignore[no-untyped-call]
        expected += _clipped(unit.mean(dim=0))
    total = torch.ones(7)

    add_clipped_sum(total, rows.clone(), sizes=sizes, max_grad_norm=CLIP)

    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


def test_norms_are_taken_over_every_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.dp._NORM_COLUMNS", 2)
    total = torch.zeros(5)

    add_clipped_sum(total, torch.tensor([[0.0, 0.0, 3.0, 0.0, 4.0]]), sizes=[1], max_grad_norm=1.0)

    torch.testing.assert_close(total, torch.tensor([0.0, 0.0, 0.6, 0.0, 0.8]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_unit_whose_gradient_is_not_finite_counts_as_zero(value: float) -> None:
    rows = torch.ones((4, 3))
    rows[1, 2] = value
    total = torch.zeros(3)

    # The second patient has the bad record and a good one; the first and the third one record each.
    add_clipped_sum(total, rows[[0, 1, 2, 3]], sizes=[1, 2, 1], max_grad_norm=10.0)

    torch.testing.assert_close(total, torch.full((3,), 2.0))


# Noise


@pytest.mark.parametrize("patients", [None, [[0]]])
def test_noise_of_the_calibrated_size_is_added_to_every_coordinate(
    base: BaseModel, patients: list[list[int]] | None
) -> None:
    """With no unit drawn, a step is pure noise: std sigma * C / B * lr in each coordinate."""
    dp = DpSettings(2.0, CLIP, 1e-18, max_records_per_patient=1 if patients else 0)
    start = lively_adapter(base)
    after = _trained(
        base, make_examples(1, lengths=(6,)), patients=patients, dp=dp,
        settings=ONE_STEP.model_copy(update={"batch_size": 2, "learning_rate": 1.0}),
    )  # fmt: skip
    with attached(base, LORA) as model:
        write_adapter(model, start)
        moved = after - _flat(model)

    # sigma * C / B * lr = 2 * 0.5 / 2 * 1 = 0.5, over 4,096 coordinates: standard errors 0.0055 and 0.0078.
    assert len(moved) == 4096
    assert float(moved.std()) == pytest.approx(0.5, abs=0.035)
    assert abs(float(moved.mean())) < 0.05


def test_neither_noise_nor_divisor_depends_on_how_many_there_are(base: BaseModel) -> None:
    """Nobody is drawn (the integers of 255s are above any threshold): the step shows the constants."""
    dp = DpSettings(1.0, CLIP, 0.5, max_records_per_patient=4)

    def entropy(size: int) -> bytes:
        return b"\xff" * size

    few = _trained(base, make_examples(1, lengths=(6,)), patients=[[0]], dp=dp, entropy=entropy)
    many = _trained(
        base, make_examples(90, lengths=(6,)), dp=dp, entropy=entropy,
        patients=[list(range(start, start + 9)) for start in range(0, 90, 9)],
    )  # fmt: skip

    assert torch.equal(few, many)


def test_noise_is_added_once_a_step_and_an_empty_batch_is_a_real_step(model: nn.Module) -> None:
    """Three micro-batches without a gradient and none at all leave noise of the same size."""

    def moved(num_micro_batches: int) -> float:
        before = _flat(model)
        with private_steps(
            model, torch.optim.SGD(_parameters(model), lr=1.0), noise_multiplier=1.0,
            max_grad_norm=CLIP, batch_size=2,
        ) as steps:  # fmt: skip
            for _ in range(num_micro_batches):
                zero = sum((0 * p.sum() for p in _parameters(model)), torch.zeros(()))
                steps.backward(zero, sizes=[1])
            steps.finish()
        return float((_flat(model) - before).std())

    assert moved(0) == pytest.approx(0.25, abs=0.015)
    assert moved(3) == pytest.approx(0.25, abs=0.015)


def test_a_second_step_starts_from_nothing(model: nn.Module) -> None:
    (example,) = make_examples(1, lengths=(9,))
    batch = collate([example], pad_id=0, device=CPU)
    with private_steps(
        model, torch.optim.SGD(_parameters(model), lr=1.0), noise_multiplier=NO_NOISE,
        max_grad_norm=CLIP, batch_size=1,
    ) as steps:  # fmt: skip
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        steps.backward(record_losses(logits, batch.labels).sum(), sizes=[1])
        steps.finish()
        before = _flat(model)
        steps.finish()

    torch.testing.assert_close(_flat(model), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("setting", ["noise_multiplier", "max_grad_norm"])
def test_noise_or_a_clip_that_gives_no_privacy_is_refused(
    model: nn.Module, setting: str, value: float
) -> None:
    numbers = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, setting: value}
    optimizer = torch.optim.SGD(_parameters(model), lr=1.0)

    with (
        pytest.raises(PrivacyError, match="gives no privacy"),
        private_steps(model, optimizer, batch_size=1, **numbers),
    ):
        pass


# Randomness


def _stream(name: str) -> Entropy:
    """Repeatable bytes for tests; no configuration reaches this argument."""
    drawn = 0

    def entropy(size: int) -> bytes:
        nonlocal drawn
        drawn += 1
        return hashlib.shake_256(f"{name}/{drawn}".encode()).digest(size)

    return entropy


class _Hostile:
    """Everything that a coordinator knows or could set, one value each."""

    def __init__(self, base: BaseModel, *, patients: list[list[int]] | None) -> None:
        self._base = base
        self._lora = LORA.model_copy(update={"dropout": 0.5})
        self._patients = patients
        self.has_patients = patients is not None
        self._start = initial_adapter(base, self._lora, seed=0)

    def digest(self, *, known: int, stream: str, server_round: int, entropy: Entropy | None) -> str:
        random.seed(known)
        np.random.seed(known)
        torch.manual_seed(known)
        options = {} if entropy is None else {"entropy": entropy}
        with attached(self._base, self._lora) as model:
            write_adapter(model, self._start)
            train(
                model, Examples(make_examples(35, lengths=(8, 12))),
                settings=TrainSection(
                    rounds=9, local_steps=2, batch_size=4, micro_batch_size=4, seed=known,
                    schedule="constant", warmup_ratio=0.0,
                ),
                server_round=server_round, stream=stream, pad_id=0, device=self._base.device,
                dp=DpSettings(0.5, CLIP, 0.5, max_records_per_patient=2 if self._patients else 0),
                patients=self._patients, **options,
            )  # fmt: skip
            return read_adapter(model, self._lora, rank=4).digest()


@pytest.fixture(params=["record", "patient"])
def hostile(request: pytest.FixtureRequest, base: BaseModel) -> _Hostile:
    patients = [list(range(start, start + 5)) for start in range(0, 35, 5)]
    return _Hostile(base, patients=patients if request.param == "patient" else None)


def test_seed_task_and_clock_change_neither_sampling_nor_masks_nor_noise(
    hostile: _Hostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes of entropy give the same adapter whatever else is known: nothing else is used."""
    first = hostile.digest(known=0, stream="north", server_round=1, entropy=_stream("a"))
    for clock in ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter"):
        monkeypatch.setattr(time, clock, lambda: 1)
    second = hostile.digest(known=7, stream="south", server_round=5, entropy=_stream("a"))
    other = hostile.digest(known=0, stream="north", server_round=1, entropy=_stream("b"))

    assert first == second
    assert first != other


def test_equal_seeds_still_train_different_adapters(hostile: _Hostile) -> None:
    def one() -> str:
        return hostile.digest(known=0, stream="north", server_round=1, entropy=None)

    assert one() != one()


def _fixed_but_for(part: str) -> Entropy:
    """Repeatable bytes, other ones for one use, which is told by its size.

    8: the masks' seed. 32: the noise's key. 40: the draw of a patient's five records. Else: the coins
    of 7 patients or 35 records.
    """
    uses = {8: "masks", 32: "noise", 40: "draws"}
    fixed = _stream("fixed")

    def entropy(size: int) -> bytes:
        data = fixed(size)
        return bytes(b ^ 0xFF for b in data) if uses.get(size, "coins") == part else data

    return entropy


@pytest.mark.parametrize("part", ["masks", "noise", "coins", "draws"])
def test_masks_noise_coins_and_draws_each_take_entropy(hostile: _Hostile, part: str) -> None:
    def digest(part: str) -> str:
        entropy = _fixed_but_for(part)
        return hostile.digest(known=0, stream="north", server_round=1, entropy=entropy)

    assert digest("nothing") == digest("nothing")
    # Records are not drawn a second time.
    taken = part != "draws" or hostile.has_patients
    assert (digest("nothing") != digest(part)) == taken


# Signal to noise


def test_signal_to_noise_is_that_of_full_agreement() -> None:
    # 16 / (2 * sqrt(64)): a sum of norm 16 C beside noise of 2 C in each of 64 coordinates.
    assert signal_to_noise(num_units=16, noise_multiplier=2.0, dimension=64) == 1.0
    noise = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 3.0 * CLIP / 50
    assert signal_to_noise(num_units=50, noise_multiplier=3.0, dimension=10_000) == pytest.approx(
        CLIP / float(noise.norm()), rel=0.03
    )
