"""Loss, perplexity and token accuracy of a model on tokenised records, and of groups of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from common.adapter import AdapterState
from common.config import LoraSection
from common.lora import carrying
from common.metrics import LanguageMetrics, TokenSums, summarize
from common.model import BaseModel
from common.prompts import Examples
from common.record_sums import record_sums
from server.evaluation.results import GroupMetrics


def lent_model(
    base: BaseModel, lora: LoraSection, adapter: AdapterState | None
) -> AbstractContextManager[nn.Module]:
    """Lend the base with an adapter, of any rank and with its own scalings; None lends it untouched."""
    return nullcontext(base.model) if adapter is None else carrying(base, lora, adapter)


def evaluate(
    base: BaseModel,
    examples: Examples,
    *,
    adapter: AdapterState | None,
    lora: LoraSection,
    batch_size: int,
) -> LanguageMetrics:
    """Return the metrics of the base with an adapter, or of the untouched base (None).

    adapter: of any rank, which no layer limits; its scalings are its own.
    """
    with lent_model(base, lora, adapter) as model:
        return evaluate_model(model, base, examples, batch_size=batch_size)


def evaluate_model(
    model: nn.Module, base: BaseModel, examples: Examples, *, batch_size: int
) -> LanguageMetrics:
    """Return the metrics of any causal language model on `base`'s device and tokenizer."""
    return summarize(record_sums(model, base, examples, batch_size=batch_size))


def group_metrics(sums: Iterable[TokenSums], groups: Sequence[str]) -> tuple[GroupMetrics, ...]:
    """Return the metrics of each group by itself, sorted by name.

    sums: of each record. groups: each record's group; as many, or none at all.
    """
    if not groups:
        return ()
    by_group: dict[str, list[TokenSums]] = {}
    for group, one in zip(groups, sums, strict=True):
        by_group.setdefault(group, []).append(one)
    return tuple(
        GroupMetrics(group, len(parts), summarize(parts))
        for group, parts in sorted(by_group.items())
    )
