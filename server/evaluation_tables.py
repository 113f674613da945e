"""An evaluation as tables that a person reads in a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from server.evaluation.results import AtSites, Evaluation, ModelResults, OptionMetrics


def evaluation_tables(evaluation: Evaluation) -> Iterator[Table]:
    """Yield what an evaluation found: metrics, groups, options, questions, the sites' own counts."""
    if evaluation.central is not None:
        base, final = evaluation.central
        yield _metrics(base, final, records=evaluation.records)
        if final.groups:
            yield _groups(base, final, column=evaluation.group_by)
        if final.options is not None and final.options.confusion:
            yield _confusion(final.options)
    if evaluation.at_sites is not None and evaluation.at_sites.sites:
        yield _sites(evaluation.at_sites)
    if evaluation.questions:
        yield _questions(evaluation)


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(title=title, header_style="bold", title_justify="left")
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _metrics(base: ModelResults, final: ModelResults, *, records: int) -> Table:
    table = _table(f"{records:,} test records", "metric", "base", "result", "change", "on records")
    rows = [
        ("loss", base.language.loss, final.language.loss, records),
        ("perplexity", base.language.perplexity, final.language.perplexity, records),
        ("token accuracy", base.language.token_accuracy, final.language.token_accuracy, records),
    ]
    if base.generation is not None and final.generation is not None:
        count = final.generation.records
        rows += [
            (words, getattr(base.generation, name), getattr(final.generation, name), count)
            for words, name in (
                ("exact match", "exact_match"),
                ("token F1", "token_f1"),
                ("ROUGE-L", "rouge_l"),
                ("BLEU", "bleu"),
            )
        ]
    if base.options is not None and final.options is not None:
        count = final.options.records
        rows += [
            ("accuracy of options", base.options.accuracy, final.options.accuracy, count),
            ("macro-F1 of options", base.options.macro_f1, final.options.macro_f1, count),
        ]
    for name, before, after, count in rows:
        table.add_row(name, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}", f"{count:,}")
    return table


def _groups(base: ModelResults, final: ModelResults, *, column: str) -> Table:
    table = _table(
        f"By {escape(column)}",
        escape(column),
        "records",
        "base loss",
        "loss",
        "change",
        "token accuracy",
    )
    worst = final.worst_group
    for before, after in zip(base.groups, final.groups, strict=True):
        table.add_row(
            Text(f"{after.group} (worst)" if after.group == worst else after.group),
            f"{after.records:,}",
            f"{before.metrics.loss:.3f}",
            f"{after.metrics.loss:.3f}",
            f"{after.metrics.loss - before.metrics.loss:+.3f}",
            f"{after.metrics.token_accuracy:.3f}",
            style="bold" if after.group == worst else "",
        )
    losses = [group.metrics.loss for group in final.groups]
    table.caption = f"from best to worst group: {max(losses) - min(losses):.3f}"
    table.caption_justify = "left"
    return table


def _confusion(options: OptionMetrics) -> Table:
    table = _table("Confusion, of the result", "true \\ chosen", *map(escape, options.labels))
    for label, row in zip(options.labels, options.confusion, strict=True):
        table.add_row(Text(label), *(f"{count:,}" for count in row))
    return table


def _sites(at_sites: AtSites) -> Table:
    table = _table(
        "Counted by the sites on their own test records: outside every epsilon",
        "site", "records", "base loss", "loss", "token accuracy",
    )  # fmt: skip
    content = at_sites.as_json()
    for site, found in [*content["sites"].items(), ("all", content["all"])]:
        table.add_row(
            site,
            f"{found['records']:,}",
            f"{found['base_loss']:.3f}",
            f"{found['loss']:.3f}",
            f"{found['token_accuracy']:.3f}",
        )
    return table


def _questions(evaluation: Evaluation) -> Table:
    table = Table(title="Answers side by side", header_style="bold", title_justify="left")
    for name in ("question", "reference", "base", "result"):
        table.add_column(name, ratio=1, overflow="fold")
    for one in evaluation.questions:
        # As text: "[/INST]" in an answer is no markup.
        cells = map(Text, (one.question, one.reference, one.base, one.final))
        table.add_row(*cells, end_section=True)
    return table
