"""What an evaluation found: frozen values, and their one JSON form, evaluation.json.

The coordinator's test records are its own to show: their text may stand in here. Of hospitals' records only
counts and sums do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.canonical import plain_json
from common.files import write_atomically
from common.metrics import LanguageMetrics, TokenSums, summarize


@dataclass(frozen=True, slots=True)
class GroupMetrics:
    """The metrics of one group of test records by itself. records: how many."""

    group: str
    records: int
    metrics: LanguageMetrics


@dataclass(frozen=True, slots=True)
class TextMetrics:
    """What generated answers are worth beside the records' own, each in [0, 1].

    exact_match, token_f1: means as SQuAD defines them (Rajpurkar et al. 1606.05250, section 6.1). rouge_l:
    mean F-measure of the longest common subsequence (Lin 2004). bleu: of the whole corpus (Papineni et
    al. 2002), by sacrebleu (Post 1804.08771) with its 13a tokens.
    """

    exact_match: float
    token_f1: float
    rouge_l: float
    bleu: float
    records: int


@dataclass(frozen=True, slots=True)
class OptionMetrics:
    """How well a model chooses among answers that are given.

    accuracy: share of records whose likeliest option is the true one. macro_f1: mean F1 of the labels.
    confusion: [true][chosen] counts, in the order of `labels`; () where a model's choice is no number.
    """

    labels: tuple[str, ...]
    accuracy: float
    macro_f1: float
    confusion: tuple[tuple[int, ...], ...]
    records: int


@dataclass(frozen=True, slots=True)
class ModelResults:
    """All that was measured of one model; None for what was not asked for."""

    language: LanguageMetrics
    generation: TextMetrics | None = None
    options: OptionMetrics | None = None
    groups: tuple[GroupMetrics, ...] = ()

    @property
    def worst_group(self) -> str:
        """The group of the highest loss, "" without groups; one whose loss is no number is worse still."""
        if not self.groups:
            return ""
        losses = {one.group: one.metrics.loss for one in self.groups}
        return max(losses, key=lambda group: (math.isnan(losses[group]), losses[group]))


@dataclass(frozen=True, slots=True)
class AnsweredQuestion:
    """One question of the fixed list, what was to be answered, and what base and result did answer."""

    question: str
    reference: str
    base: str
    final: str


@dataclass(frozen=True, slots=True)
class SiteSums:
    """What one site counted on its own test records, rounded by its policy: nothing else left it.

    base, final: sums over the answer tokens of `records` records, of the two models.
    """

    records: int
    base: TokenSums
    final: TokenSums

    def as_json(self) -> dict[str, Any]:
        """Return it as metrics."""
        base, final = summarize([self.base]), summarize([self.final])
        return {
            "records": self.records,
            "tokens": self.final.tokens,
            "loss": final.loss,
            "perplexity": final.perplexity,
            "token_accuracy": final.token_accuracy,
            "base_loss": base.loss,
            "base_perplexity": base.perplexity,
            "base_token_accuracy": base.token_accuracy,
        }


@dataclass(frozen=True, slots=True)
class AtSites:
    """Evaluation at the sites: sums by site, and why others gave none. Outside every epsilon."""

    sites: Mapping[str, SiteSums]
    refused: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """Return it as metrics, by site and of all together."""
        every = list(self.sites.values())
        together = SiteSums(
            sum(one.records for one in every),
            TokenSums.total(one.base for one in every),
            TokenSums.total(one.final for one in every),
        )
        return {
            "sites": {site: one.as_json() for site, one in sorted(self.sites.items())},
            "all": together.as_json() if every else None,
            "refused": dict(self.refused),
            "outside_epsilon": True,
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One adapter beside its untouched base. server_round: that made it. adapter, base: digests.

    central: base's and result's on the coordinator's records, None without any. other_records: whether these
    were named for this evaluation, and are not where those of the run itself are. group_by: see `CentralSet`.
    """

    run_uid: str
    server_round: int
    adapter: str
    base: str
    records: int
    central: tuple[ModelResults, ModelResults] | None
    group_by: str = ""
    questions: tuple[AnsweredQuestion, ...] = ()
    at_sites: AtSites | None = None
    other_records: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return what evaluation.json holds."""
        models = None
        if self.central is not None:
            base, final = self.central
            models = {"base": _model_json(base), "final": _model_json(final)}
        return {
            "run": self.run_uid,
            "round": self.server_round,
            "adapter": self.adapter,
            "base": self.base,
            "records": self.records,
            "other_records": self.other_records,
            "models": models,
            "group_column": self.group_by,
            "worst_group": self.central[1].worst_group if self.central else "",
            "questions": [asdict(question) for question in self.questions],
            "federated": None if self.at_sites is None else self.at_sites.as_json(),
        }

    def write(self, path: Path) -> dict[str, Any]:
        """Write evaluation.json atomically and return it; what sites counted for this round, once, stays.

        What is not finite is null there: not every reader of JSON knows NaN.
        """
        content: dict[str, Any] = plain_json(self.as_json())
        before = _read(path)
        same = (before.get("run"), before.get("round")) == (self.run_uid, self.server_round)
        # Not by the adapter's digest: without its checkpoint the same adapter has another one.
        if content["federated"] is None and same:
            content["federated"] = before.get("federated")
        write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
        return content


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _model_json(results: ModelResults) -> dict[str, Any]:
    return {
        "language": asdict(results.language),
        "generation": None if results.generation is None else asdict(results.generation),
        "options": None if results.options is None else asdict(results.options),
        "groups": [
            {"group": one.group, "records": one.records, **asdict(one.metrics)}
            for one in results.groups
        ],
    }
