"""What the central records gave under the untouched base and under the newest adapter, counted once each.

A run measures its base before the first round and its result after the last, and the comparison that it ends
with wants the same numbers by groups: over a large test set each of those passes takes minutes.
"""

from __future__ import annotations

from collections.abc import Callable

from common.adapter import AdapterState
from common.config import RunConfig
from common.metrics import LanguageMetrics, TokenSums, summarize
from common.model import BaseModel
from common.prompts import Examples
from common.record_sums import record_sums
from server.evaluation.language import lent_model

_Key = tuple[str, float, tuple[tuple[str, float], ...]] | None


class CentralCounts:
    """Each central record's sums, of two models at most: the base and the newest adapter."""

    def __init__(self, base: BaseModel, examples: Examples, *, config: RunConfig) -> None:
        self._base = base
        self._examples = examples
        self._config = config
        self._kept: dict[_Key, tuple[TokenSums, ...]] = {}

    def sums(
        self, adapter: AdapterState | None, *, on_batch: Callable[[int], None] = lambda done: None
    ) -> tuple[TokenSums, ...]:
        """Return each record's sums under the base with an adapter, or under the untouched base (None).

        on_batch: is told how many records each batch held; all at once where they were counted before.
        """
        key = _key(adapter)
        if key in self._kept:
            on_batch(len(self._examples))
            return self._kept[key]
        with lent_model(self._base, self._config.lora, adapter) as model:
            found = record_sums(
                model,
                self._base,
                self._examples,
                batch_size=self._config.evaluation.batch_size,
                on_batch=on_batch,
            )
        # The base's stay, the adapter's before this one go.
        for earlier in [kept for kept in self._kept if kept is not None]:
            del self._kept[earlier]
        self._kept[key] = found
        return found

    def metrics(self, adapter: AdapterState | None) -> LanguageMetrics:
        """Return the metrics over all records, of what `sums` returns."""
        return summarize(self.sums(adapter))


def _key(adapter: AdapterState | None) -> _Key:
    if adapter is None:
        return None
    return adapter.digest(), adapter.scaling, tuple(sorted(adapter.own_scalings.items()))
