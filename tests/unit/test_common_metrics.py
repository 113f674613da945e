"""Losses by hand, and each record's loss its own."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.metrics import TokenSums, record_losses, summarize, token_sums
from common.prompts import IGNORE


def _logits(*rows: list[list[float]]) -> Tensor:
    """Logits whose softmax is the given probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log().float()


def _random(batch: int, length: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, length, 7, generator=random)
    labels = torch.randint(0, 7, (batch, length), generator=random)
    labels[:, : length // 2] = IGNORE
    return logits, labels


# Position t predicts token t + 1; the last position predicts nothing.
HAND = _logits([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]], [[0.8, 0.2], [0.5, 0.5], [0.1, 0.9]])
HAND_LABELS = torch.tensor([[IGNORE, 0, 1], [IGNORE, IGNORE, 1]])


def test_record_loss_is_the_mean_over_its_own_answer_tokens() -> None:
    losses = record_losses(HAND, HAND_LABELS)

    # Record 0: -ln 0.5 and -ln 0.75; record 1: -ln 0.5 alone, not divided by the batch's three.
    expected = [(math.log(2) + math.log(4 / 3)) / 2, math.log(2)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)


def test_token_sums_by_hand() -> None:
    sums = token_sums(HAND, HAND_LABELS)

    nlls = [math.log(2) + math.log(4 / 3), math.log(2)]
    assert [one.nll for one in sums] == pytest.approx(nlls, abs=1e-6)
    # argmax of a tie is the first: right for record 0's first token, wrong for record 1's.
    assert [(one.correct, one.tokens) for one in sums] == [(2, 2), (0, 1)]


def test_record_without_answer_has_loss_zero_and_no_gradient() -> None:
    logits = HAND.clone().requires_grad_()
    labels = torch.full((2, 3), IGNORE)

    losses = record_losses(logits, labels)
    losses.sum().backward()

    assert losses.tolist() == [0.0, 0.0]
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_record_and_its_gradient_do_not_change_with_its_neighbour() -> None:
    logits, labels = _random(2, 6)
    other = labels.clone()
    other[1] = torch.tensor([IGNORE, IGNORE, IGNORE, IGNORE, IGNORE, 3])

    def first(batch_labels: Tensor, neighbour: float) -> tuple[Tensor, Tensor]:
        given = logits.clone()
        given[1] *= neighbour
        given.requires_grad_()
        losses = record_losses(given, batch_labels)
        (gradient,) = torch.autograd.grad(losses.sum(), given)
        return losses[0].detach(), gradient[0]

    loss, gradient = first(labels, 1.0)
    for neighbour in (first(other, 1.0), first(labels, 50.0)):
        assert torch.equal(neighbour[0], loss)
        assert torch.equal(neighbour[1], gradient)
    assert torch.allclose(record_losses(logits[:1], labels[:1])[0], loss, atol=1e-6)


def test_padding_changes_no_record() -> None:
    logits, labels = _random(3, 6)
    padded_logits = torch.cat([logits, torch.full((3, 4, 7), 9.0)], dim=1)
    padded_labels = torch.cat([labels, torch.full((3, 4), IGNORE)], dim=1)

    found, expected = record_losses(padded_logits, padded_labels), record_losses(logits, labels)

    assert torch.allclose(found, expected, atol=1e-6)
    sums, padded = token_sums(logits, labels), token_sums(padded_logits, padded_labels)
    for one, alone in zip(padded, sums, strict=True):
        assert (one.correct, one.tokens) == (alone.correct, alone.tokens)
        assert one.nll == pytest.approx(alone.nll, abs=1e-5)


def test_losses_are_computed_in_float32_whatever_the_model_speaks() -> None:
    logits, labels = _random(2, 6)

    found = record_losses(logits.bfloat16(), labels)

    assert found.dtype == torch.float32
    assert torch.equal(found, record_losses(logits.bfloat16().float(), labels))


@given(st.integers(1, 5), st.integers(2, 8), st.integers(0, 50))
def test_a_records_token_sums_are_its_own_whatever_the_batch(
    batch: int, length: int, seed: int
) -> None:
    logits, labels = _random(batch, length, seed=seed)

    for row, one in enumerate(token_sums(logits, labels)):
        (alone,) = token_sums(logits[row : row + 1], labels[row : row + 1])
        assert (one.correct, one.tokens) == (alone.correct, alone.tokens)
        assert one.tokens == length - length // 2
        assert one.nll == pytest.approx(alone.nll, abs=1e-5)


sums_ = st.builds(
    TokenSums,
    st.integers(0, 2**20).map(lambda n: n / 2**10),
    st.integers(0, 5),
    st.integers(5, 50),
)


@given(st.lists(sums_, min_size=1, max_size=6))
def test_summary_does_not_depend_on_how_or_in_which_order_sums_are_split(
    parts: list[TokenSums],
) -> None:
    merged = TokenSums(
        sum(p.nll for p in parts), sum(p.correct for p in parts), sum(p.tokens for p in parts)
    )

    assert summarize(parts) == summarize(reversed(parts)) == summarize([merged])


def test_summary_weighs_tokens_and_not_parts() -> None:
    found = summarize([TokenSums(1.0, 1, 1), TokenSums(5.0, 0, 3)])

    assert (found.loss, found.token_accuracy) == (1.5, 0.25)


@given(st.floats(0, 600))
def test_perplexity_is_exp_of_the_loss(loss: float) -> None:
    found = summarize([TokenSums(loss, 0, 1)])

    assert found.loss == loss
    assert found.perplexity == math.exp(loss)


def test_perplexity_beyond_any_float_is_infinite() -> None:
    assert summarize([TokenSums(1e6, 0, 1)]).perplexity == math.inf


@pytest.mark.parametrize("parts", [[], [TokenSums()]])
def test_no_answer_token_is_not_a_number(parts: list[TokenSums]) -> None:
    found = summarize(parts)

    assert math.isnan(found.loss)
    assert math.isnan(found.perplexity)
    assert math.isnan(found.token_accuracy)


def test_uniform_logits_have_perplexity_of_the_vocabulary() -> None:
    labels = torch.tensor([[IGNORE, 1, 2, 3]])
    sums = [token_sums(torch.zeros(1, 4, n), labels) for n in (4, 8, 16)]
    perplexities = [summarize(item).perplexity for item in sums]

    assert perplexities == pytest.approx([4, 8, 16], rel=1e-5)
    assert all(a < b for a, b in pairwise(perplexities))
