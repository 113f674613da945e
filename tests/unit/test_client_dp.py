"""The laws that the guarantee rests on, against naive loops small enough to trust."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from client.dp import make_private, zero_record_gradients
from client.trainer import DpSettings, train
from common.adapter import AdapterState, LoraPair
from common.config import LoraSection, TrainSection
from common.errors import PrivacyError
from common.metrics import record_losses
from common.model import BaseModel, attached, initial_adapter, read_adapter, write_adapter
from common.prompts import Example, Examples, collate
from tests.unit.tiny import make_examples, tiny_base

# Said for the first layer, whose input needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

LORA = LoraSection(rank=4, alpha=8.0)
CLIP = 0.5


@pytest.fixture
def base() -> BaseModel:
    return tiny_base("llama")


@pytest.fixture
def model(base: BaseModel) -> Iterator[nn.Module]:
    start = _lively_adapter(base)
    with attached(base, LORA) as lent:
        write_adapter(lent, start)
        yield lent


def _neighbours() -> tuple[Example, Example, Example]:
    """A record, and two others with answers of 3 and 25 tokens."""
    record, short, long = make_examples(3, lengths=(12, 5, 30))
    return record, short, replace(long, num_answer=25)


def _lively_adapter(base: BaseModel) -> AdapterState:
    """An adapter whose B is not zero, so that A has gradients too."""
    state = initial_adapter(base, LORA, seed=0)
    random = torch.Generator().manual_seed(1)
    pairs = {
        name: LoraPair(pair.A, (0.1 * torch.randn(pair.B.shape, generator=random)).numpy())
        for name, pair in state.pairs.items()
    }
    return AdapterState(pairs, state.scaling)


def _record_gradients(model: nn.Module, examples: list[Example]) -> list[torch.Tensor]:
    """Per-record gradients by Opacus's hooks, flat, one row a record."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    private, dp_optimizer = make_private(
        model, optimizer, noise_multiplier=1.0, max_grad_norm=CLIP, batch_size=2
    )
    try:
        batch = collate(examples, pad_id=0, device=torch.device("cpu"))
        logits = private(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        record_losses(logits, batch.labels).sum().backward()
        rows = [g.flatten(1) for g in dp_optimizer.grad_samples]
        return list(torch.cat(rows, dim=1).detach().clone())
    finally:
        private.remove_hooks()


def test_a_records_gradient_does_not_change_with_its_neighbour(model: nn.Module) -> None:
    record, short, long = _neighbours()

    with_short = _record_gradients(model, [record, short])[0]
    with_long = _record_gradients(model, [record, long])[0]

    assert float(with_short.norm()) > 0.01
    torch.testing.assert_close(with_short, with_long, rtol=1e-4, atol=1e-6)


def test_the_models_own_loss_would_break_that_law(model: nn.Module) -> None:
    """Why `outputs.loss` is never used: a longer neighbour shrinks a record's gradient."""
    record, short, long = _neighbours()

    def gradient(neighbour: Example) -> torch.Tensor:
        batch = collate([record, neighbour], pad_id=0, device=torch.device("cpu"))
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        tokens = (batch.labels[:, 1:] != -100).sum()
        own = record_losses(logits, batch.labels)[0] * (batch.labels[0, 1:] != -100).sum() / tokens
        grads = torch.autograd.grad(own, [p for p in model.parameters() if p.requires_grad])
        return torch.cat([g.flatten() for g in grads])

    assert float(gradient(short).norm()) > 2 * float(gradient(long).norm())


def test_hooks_give_the_gradients_of_one_record_at_a_time(model: nn.Module) -> None:
    examples = make_examples(3, lengths=(6, 14, 9))

    together = _record_gradients(model, examples)
    for row, example in zip(together, examples, strict=True):
        torch.testing.assert_close(row, _naive_gradient(model, example), rtol=1e-4, atol=1e-6)


def _naive_gradient(model: nn.Module, example: Example) -> torch.Tensor:
    batch = collate([example], pad_id=0, device=torch.device("cpu"))
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    loss = record_losses(logits, batch.labels).sum()
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
def test_one_step_equals_naive_clipping_of_each_record(
    base: BaseModel, micro_batch_size: int
) -> None:
    """sigma tiny, rate 1: theta - lr / B * sum of clipped per-record gradients, to 1e-5."""
    examples = make_examples(5, lengths=(6, 14, 9, 22, 4))
    settings = TrainSection(
        rounds=1,
        local_steps=1,
        batch_size=4,
        micro_batch_size=micro_batch_size,
        learning_rate=0.5,
        optimizer="sgd",
        schedule="constant",
        warmup_ratio=0.0,
    )
    start = _lively_adapter(base)
    with attached(base, LORA) as model:
        write_adapter(model, start)
        before = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        clipped = []
        for example in examples:
            gradient = _naive_gradient(model, example)
            clipped.append(gradient * min(1.0, CLIP / float(gradient.norm())))
        expected = before - 0.5 / 4 * torch.stack(clipped).sum(dim=0)
        train(
            model,
            Examples(examples),
            settings=settings,
            server_round=1,
            stream="site",
            pad_id=0,
            device=base.device,
            dp=DpSettings(noise_multiplier=1e-9, max_grad_norm=CLIP, sample_rate=1.0),
        )
        after = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    assert max(float(torch.stack(clipped).norm(dim=1).max()), 0) <= CLIP * 1.0001
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)


def test_noise_of_the_calibrated_size_is_added_to_every_coordinate(base: BaseModel) -> None:
    """With no record drawn, a step is pure noise: std sigma * C / B * lr in each coordinate."""
    settings = TrainSection(
        rounds=1, local_steps=1, batch_size=2, learning_rate=1.0, optimizer="sgd",
        schedule="constant", warmup_ratio=0.0,
    )  # fmt: skip
    start = initial_adapter(base, LORA, seed=0)
    with attached(base, LORA) as model:
        write_adapter(model, start)
        train(
            model,
            Examples(make_examples(1, lengths=(6,))),
            settings=settings,
            server_round=1,
            stream="site",
            pad_id=0,
            device=base.device,
            dp=DpSettings(noise_multiplier=2.0, max_grad_norm=CLIP, sample_rate=1e-18),
        )
        end = read_adapter(model, LORA, rank=4)

    moved = torch.cat(
        [
            torch.from_numpy(end.pairs[name].B - pair.B).flatten()
            for name, pair in start.pairs.items()
        ]
    )
    # sigma * C / B * lr = 2 * 0.5 / 2 * 1 = 0.5, over some 2,000 coordinates.
    assert float(moved.std()) == pytest.approx(0.5, rel=0.12)
    assert abs(float(moved.mean())) < 0.06


def test_an_empty_batch_is_a_real_step(model: nn.Module) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    private, optimizer = make_private(
        model,
        torch.optim.SGD(parameters, lr=1.0),
        noise_multiplier=1.0,
        max_grad_norm=CLIP,
        batch_size=2,
    )
    before = [p.detach().clone() for p in parameters]
    zero_record_gradients(optimizer)
    optimizer.step()
    private.remove_hooks()

    assert all(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_a_record_whose_gradient_is_not_finite_counts_as_zero(model: nn.Module) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    private, optimizer = make_private(
        model,
        torch.optim.SGD(parameters, lr=1.0),
        noise_multiplier=1e-12,
        max_grad_norm=1e6,
        batch_size=1,
    )
    for parameter in parameters:
        rows = torch.ones((2, *parameter.shape))
        rows[0] = float("nan") if parameter is parameters[0] else 5.0
        parameter.grad_sample = rows
    optimizer.step()
    private.remove_hooks()

    # Only the second record's ones remain.
    for parameter in parameters:
        torch.testing.assert_close(parameter.grad, torch.ones_like(parameter), atol=1e-4, rtol=0)


def test_noise_does_not_come_from_torchs_generator(model: nn.Module) -> None:
    def step() -> torch.Tensor:
        torch.manual_seed(0)
        parameters = [p for p in model.parameters() if p.requires_grad]
        private, optimizer = make_private(
            model,
            torch.optim.SGD(parameters, lr=0.0),
            noise_multiplier=1.0,
            max_grad_norm=CLIP,
            batch_size=1,
        )
        zero_record_gradients(optimizer)
        optimizer.step()
        private.remove_hooks()
        gradient = parameters[0].grad
        assert gradient is not None
        return gradient.clone()

    assert not torch.equal(step(), step())


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_a_noise_multiplier_that_gives_no_privacy_is_refused(
    model: nn.Module, sigma: float
) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)

    with pytest.raises(PrivacyError, match="gives no privacy"):
        make_private(model, optimizer, noise_multiplier=sigma, max_grad_norm=1.0, batch_size=1)


def test_a_trainable_parameter_without_record_gradients_is_refused(base: BaseModel) -> None:
    with attached(base, LORA) as model:
        next(p for n, p in model.named_parameters() if "embed" in n).requires_grad_(True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        with pytest.raises(PrivacyError, match="no per-record gradient"):
            make_private(model, optimizer, noise_multiplier=1.0, max_grad_norm=1.0, batch_size=1)


def test_the_runs_seed_does_not_choose_dropouts_masks(base: BaseModel) -> None:
    """A mask that the coordinator can foresee would tie one record's gradient to its neighbours."""
    lora = LORA.model_copy(update={"dropout": 0.5})
    start = initial_adapter(base, lora, seed=0)

    def trained(seed: int, mask_entropy: int) -> str:
        def entropy(size: int) -> bytes:
            return bytes([mask_entropy]) * size if size == 8 else bytes(size)

        with attached(base, lora) as model:
            write_adapter(model, start)
            train(
                model,
                Examples(make_examples(4, lengths=(8, 12))),
                settings=TrainSection(rounds=1, local_steps=2, batch_size=2, seed=seed),
                server_round=1,
                stream="site",
                pad_id=0,
                device=base.device,
                dp=DpSettings(noise_multiplier=1e-9, max_grad_norm=1.0, sample_rate=1.0),
                entropy=entropy,
            )
            return read_adapter(model, lora, rank=4).digest()

    assert trained(seed=0, mask_entropy=1) == trained(seed=7, mask_entropy=1)
    assert trained(seed=0, mask_entropy=1) != trained(seed=0, mask_entropy=2)
