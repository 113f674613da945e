"""What an evaluation and the attacks found, as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from server.report.record import RunRecord
from server.report.results import Attack, Evaluation, Federated, ModelScores, SiteScores
from server.report.tables import NOTHING, TextTable, number


def metrics_table(run: RunRecord) -> TextTable | None:
    """Return every metric of the result beside that of the untouched base."""
    evaluation = run.evaluation
    base = evaluation.models.base if evaluation else ModelScores()
    final = evaluation.models.final if evaluation else ModelScores()
    language = (base.language, final.language)
    if language[0].loss is None or language[1].loss is None:
        if run.base is None or run.final is None:
            return None
        pair: tuple[object, object] = (run.base, run.final)
    else:
        pair = language
    rows = list(_metric_rows(pair, _LANGUAGE))
    every = evaluation.records if evaluation else 0
    if base.generation and final.generation:
        on = _on(final.generation.records, every)
        rows += _metric_rows((base.generation, final.generation), _GENERATION, on=on)
    if base.options and final.options:
        on = _on(final.options.records, every)
        rows += _metric_rows((base.options, final.options), _OPTIONS, on=on)
    records = f", {evaluation.records:,} records" if evaluation and evaluation.records else ""
    return TextTable(
        f"On test records that were named for this evaluation{records}"
        if evaluation and evaluation.other_records
        else f"On the coordinator's test set{records}",
        ("metric", "base", "this run", "change"),
        tuple(rows),
    )


_LANGUAGE = (
    ("loss", "Loss (lower is better)", ".3f"),
    ("perplexity", "Perplexity (lower is better)", ".2f"),
    ("token_accuracy", "Token accuracy", ".1%"),
)


_GENERATION = (
    ("exact_match", "Exact match", ".1%"),
    ("token_f1", "Token F1", ".1%"),
    ("rouge_l", "ROUGE-L", ".3f"),
    ("bleu", "BLEU", ".3f"),
)


_OPTIONS = (("accuracy", "Accuracy over labels", ".1%"), ("macro_f1", "Macro F1", ".3f"))


def _on(records: int, every: int) -> str:
    """Where a metric is of some of the records only, of how many."""
    return f" (on {records:,} records)" if 0 < records < every else ""


def _metric_rows(
    pair: tuple[object, object], metrics: tuple[tuple[str, str, str], ...], *, on: str = ""
) -> Iterator[tuple[str, ...]]:
    for name, said, form in metrics:
        before: float | None = getattr(pair[0], name)
        after: float | None = getattr(pair[1], name)
        if before is None and after is None:
            continue
        change = NOTHING
        if before is not None and after is not None:
            percent = form.endswith("%")
            change = (
                f"{100 * (after - before):+.1f} points" if percent else f"{after - before:+{form}}"
            )
        yield (said + on, number(before, form), number(after, form), change)


def groups_table(evaluation: Evaluation) -> TextTable | None:
    """Return each group's metrics beside the base's, the worst one pointed out."""
    final = evaluation.models.final.groups
    if not final:
        return None
    base = {one.group: one for one in evaluation.models.base.groups}
    rows = []
    for one in final:
        before = base.get(one.group)
        rows.append(
            (
                one.group,
                f"{one.records:,}",
                number(before.loss if before else None),
                number(one.loss),
                number(before.token_accuracy if before else None, ".1%"),
                number(one.token_accuracy, ".1%"),
            )
        )
    worst = [row for row, one in enumerate(final) if one.group == evaluation.worst_group]
    named = f"; {evaluation.worst_group} is served worst" if worst else ""
    return TextTable(
        f"By {evaluation.group_column or 'group'}{named}",
        ("group", "records", "loss, base", "loss", "accuracy, base", "accuracy"),
        tuple(rows),
        marked=frozenset(worst),
    )


def confusion_table(evaluation: Evaluation) -> TextTable | None:
    """Return how often which label was taken for which."""
    options = evaluation.models.final.options
    if options is None or not options.confusion:
        return None
    return TextTable(
        "Confusion: rows are true, columns what the model chose",
        ("true", *options.labels),
        tuple(
            (label, *(f"{count:,}" for count in counts))
            for label, counts in zip(options.labels, options.confusion, strict=False)
        ),
    )


def federated_table(federated: Federated) -> TextTable:
    """Return what the sites measured on their own records."""

    def row(name: str, one: SiteScores) -> tuple[str, ...]:
        return (
            name,
            f"{one.records:,}",
            number(one.base_loss),
            number(one.loss),
            number(one.base_token_accuracy, ".1%"),
            number(one.token_accuracy, ".1%"),
        )

    rows = [row(name, one) for name, one in sorted(federated.sites.items())]
    if federated.all is not None:
        rows.append(row("all", federated.all))
    return TextTable(
        "At the sites, on their own records: counts and sums only, and outside epsilon",
        ("site", "records", "loss, base", "loss", "accuracy, base", "accuracy"),
        tuple(rows),
    )


def attack_tables(attack: Attack) -> list[TextTable]:
    """Return what the audits measured."""
    found = []
    if attack.audits:
        found.append(
            TextTable(
                "Lower bounds on epsilon, each from one training run",
                (
                    "audit",
                    "canaries",
                    "guesses",
                    "correct",
                    "epsilon at least",
                    "as claimed",
                    "ledger",
                ),
                tuple(
                    (
                        f"{one.name} ({one.confidence:.0%})",
                        f"{one.canaries:,}",
                        f"{one.guesses:,}",
                        f"{one.correct:,}",
                        number(one.epsilon_lower, ".2f"),
                        number(one.epsilon_rehearsed, ".2f"),
                        number(one.ledger_epsilon_at_delta, ".2f"),
                    )
                    for one in attack.audits
                ),
            )
        )
    if attack.membership:
        found.append(
            TextTable(
                "Membership tests; 0.500 and 1.0% are guessing",
                ("test", "members", "others", "AUC", "found at 1% false alarms"),
                tuple(
                    (
                        f"{one.name} ({one.confidence:.0%})",
                        f"{one.members:,}",
                        f"{one.nonmembers:,}",
                        _interval(one.auc, lambda value: f"{value:.3f}"),
                        _interval(one.tpr_at_1pct_fpr, lambda value: f"{value:.1%}"),
                    )
                    for one in attack.membership
                ),
            )
        )
    planted = attack.planted
    if planted is not None:
        found.append(
            TextTable(
                "Planted identifiers",
                ("planted", "prompts", "samples each", "said by the model", "said by the base"),
                (
                    (
                        f"{planted.planted:,}",
                        f"{planted.prompts:,}",
                        f"{planted.samples_per_prompt:,}",
                        f"{planted.reproduced:,}",
                        f"{planted.reproduced_by_base:,}",
                    ),
                ),
                words=0,
            )
        )
    return found


def _interval(value: tuple[float, float, float] | None, said: Callable[[float], str]) -> str:
    if value is None:
        return NOTHING
    return f"{said(value[0])} ({said(value[1])} to {said(value[2])})"
