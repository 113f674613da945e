"""Losses and token metrics, as pure functions of logits and labels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from common.prompts import IGNORE


@dataclass(frozen=True, slots=True)
class TokenSums:
    """Sums over answer tokens: nll in nats, correct and tokens as counts. Sums add up exactly."""

    nll: float = 0.0
    correct: int = 0
    tokens: int = 0

    @classmethod
    def total(cls, parts: Iterable[TokenSums]) -> TokenSums:
        """Return the sums of all parts together."""
        items = list(parts)
        return cls(
            math.fsum(item.nll for item in items),
            sum(item.correct for item in items),
            sum(item.tokens for item in items),
        )


@dataclass(frozen=True, slots=True)
class LanguageMetrics:
    """loss: mean nats per answer token; perplexity: exp(loss); token_accuracy: in [0, 1]."""

    loss: float
    perplexity: float
    token_accuracy: float


def record_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each record's mean cross-entropy over its own answer tokens.

    logits: (batch, length, vocabulary); labels: (batch, length), IGNORE outside the answer.
    Returns (batch,), float32; 0 for a record without answer tokens. One record's value depends on
    that record alone, which is what per-record clipping needs (Abadi et al. 1607.00133, section 3).
    """
    nll, mask = token_losses(logits, labels)
    return (nll * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def token_sums(logits: Tensor, labels: Tensor) -> list[TokenSums]:
    """Return each record's sums over its answer tokens (shapes as in `record_losses`)."""
    nll, mask = token_losses(logits, labels)
    hits = (logits[:, :-1].argmax(dim=-1) == labels[:, 1:]) & mask.bool()
    nlls = (nll.double() * mask).sum(dim=1).tolist()
    correct, tokens = hits.sum(dim=1).tolist(), mask.sum(dim=1).long().tolist()
    return [TokenSums(*sums) for sums in zip(nlls, correct, tokens, strict=True)]


def summarize(parts: Iterable[TokenSums]) -> LanguageMetrics:
    """Return the metrics of all parts together; NaN when there is no answer token."""
    total = TokenSums.total(parts)
    if total.tokens == 0:
        return LanguageMetrics(math.nan, math.nan, math.nan)
    loss = total.nll / total.tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return LanguageMetrics(loss, perplexity, total.correct / total.tokens)


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each position's cross-entropy against the next label, and 1 where that is of an answer.

    Shapes as in `record_losses`. Returns two (batch, length - 1), float32.
    """
    targets = labels[:, 1:]
    mask = (targets != IGNORE).to(torch.float32)
    # A token's scores side by side in memory: the other layout takes a quarter longer.
    nll = functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.clamp(min=0).flatten(), reduction="none"
    )
    return nll.view(targets.shape), mask
