"""A comparison's results as people read them: one line for each arm, mean and spread over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.table import Table

from simulations.arms import BASE, FEDERATED, FEDERATED_DP, METHOD, METHOD_DP
from simulations.compare import ArmResult, grouped


def comparison_table(results: Sequence[ArmResult]) -> Table:
    """Return the results as a table: mean over seeds, spread where there is more than one."""
    seeds = len({result.seed for result in results})
    table = Table(title=f"Central test set, {seeds} seed{'s' if seeds > 1 else ''}")
    table.add_column("model", no_wrap=True)
    for column in ("loss", "perplexity", "accuracy", "epsilon", "seconds"):
        table.add_column(column, justify="right")
    base = statistics.fmean(r.loss for r in results if r.kind == BASE)
    for label, rows in grouped(results):
        losses = [row.loss for row in rows]
        change = "" if rows[0].kind == BASE else f" ({statistics.fmean(losses) / base - 1:+.0%})"
        spread = ""
        if seeds > 1 and len(rows) > 1:
            spread = f" ± {statistics.stdev(losses):.3f}"
        epsilons = [row.epsilon for row in rows if row.epsilon is not None]
        seconds = statistics.fmean(row.wall_s for row in rows)
        table.add_row(
            label,
            f"{statistics.fmean(losses):.3f}{spread}{change}",
            f"{statistics.fmean(row.perplexity for row in rows):.2f}",
            f"{statistics.fmean(row.token_accuracy for row in rows):.3f}",
            f"{max(epsilons):.2f}" if epsilons else "-",
            "-" if rows[0].kind == BASE else f"{seconds:.1f}",
            style="bold" if rows[0].kind in (FEDERATED, FEDERATED_DP) else None,
        )
    return table


def methods_table(results: Sequence[ArmResult]) -> Table:
    """Return a comparison of methods: each one's loss, and what it is better or worse than the first by.

    The difference is taken seed by seed, since sites start and draw alike there; the mean of lowest loss is
    bold, with and without DP. An arm whose settings were tuned on the very test set that is reported is
    favoured by that; tune on another one.
    """
    seeds = len({result.seed for result in results})
    table = Table(
        title=f"Central test set, {seeds} seed{'s' if seeds > 1 else ''}, mean ± deviation"
    )
    table.add_column("method", no_wrap=True)
    for column in ("loss", "beside the first", "perplexity", "epsilon", "seconds"):
        table.add_column(column, justify="right")
    groups = grouped(results)
    best = {
        kind: min(_mean(rows) for _, rows in groups if rows[0].kind == kind)
        for kind in {rows[0].kind for _, rows in groups}
    }
    for label, rows in groups:
        kind = rows[0].kind
        first = next(others for _, others in groups if others[0].kind == kind)
        epsilons = [row.epsilon for row in rows if row.epsilon is not None]
        table.add_row(
            label,
            _with_spread([row.loss for row in rows]),
            "-" if first is rows else _with_spread(_differences(rows, first), sign="+"),
            f"{statistics.fmean(row.perplexity for row in rows):.2f}",
            f"{max(epsilons):.2f}" if epsilons else "-",
            "-" if kind == BASE else f"{statistics.fmean(row.wall_s for row in rows):.1f}",
            style="bold" if kind in (METHOD, METHOD_DP) and _mean(rows) == best[kind] else None,
            end_section=label == groups[-1][0] or kind != _next_kind(groups, label),
        )
    return table


def _mean(rows: Sequence[ArmResult]) -> float:
    return statistics.fmean(row.loss for row in rows)


def _differences(rows: Sequence[ArmResult], first: Sequence[ArmResult]) -> list[float]:
    by_seed = {row.seed: row.loss for row in first}
    return [row.loss - by_seed[row.seed] for row in rows if row.seed in by_seed]


def _with_spread(values: Sequence[float], *, sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.3f}{spread}"


def _next_kind(groups: Sequence[tuple[str, Sequence[ArmResult]]], label: str) -> str:
    names = [name for name, _ in groups]
    following = names.index(label) + 1
    return groups[following][1][0].kind if following < len(groups) else ""
