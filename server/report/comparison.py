"""Several runs on one page: their curves over each other, and one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from common.errors import ConfigError
from server.report.drawing import (
    BLUE,
    DASHES,
    INK,
    MUTED,
    ORANGE,
    SERIES,
    Picture,
    drawing,
    in_percent,
    marker,
    whole_rounds,
)
from server.report.markup import render
from server.report.reading import damage_in_words, read_run
from server.report.record import RunRecord, Scores
from server.report.signs import warning_signs
from server.report.tables import TextTable, duration, number, size

# More lines cannot be told apart.
MOST_RUNS = len(SERIES) * len(DASHES)


def comparison_page(run_dirs: Sequence[Path]) -> str:
    """Return one page about several runs. Raises ConfigError for more than MOST_RUNS, or no run.

    Raises DataError as `read_run` and `run_page`.
    """
    if len(run_dirs) > MOST_RUNS:
        raise ConfigError(
            f"{len(run_dirs)} runs are more than the {MOST_RUNS} whose lines can be told apart; compare fewer"
        )
    runs = [read_run(path) for path in run_dirs]
    names = distinct_names(run_dirs)
    with damage_in_words(" or ".join(names)):
        return _page(runs, names)


def _page(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    pictures = [
        _curves(
            runs,
            names,
            "loss",
            title="Loss",
            unit="nats per answer token",
            value=lambda scores: scores.loss,
            caption="On each run's own test set, which must be the same one to compare; lower is better.",
        ),
        _curves(
            runs,
            names,
            "accuracy",
            title="Token accuracy",
            unit="share of answer tokens",
            value=lambda scores: scores.token_accuracy,
            caption="How many of the answers' tokens the model names first; higher is better.",
            percent=True,
        ),
        _epsilons(runs, names),
    ]
    return render(
        "comparison.html.j2",
        title=f"{len(runs)} runs compared",
        outcome=_outcome(runs, names),
        pictures=[picture for picture in pictures if picture is not None],
        table=_table(runs, names),
        differences=_differences(runs, names),
        signs=[
            (name, sign)
            for name, run in zip(names, runs, strict=True)
            for sign in warning_signs(run)
        ],
        made_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def distinct_names(run_dirs: Sequence[Path]) -> list[str]:
    """Return a name for each folder: its own, with as many of its parents' as tell it from the others."""
    paths = [path.resolve().parts for path in run_dirs]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"{run_dirs[0]} is named twice; name each run once")


def _outcome(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    losses = [
        (run.final.loss, name)
        for run, name in zip(runs, names, strict=True)
        if run.final is not None and run.final.loss is not None and math.isfinite(run.final.loss)
    ]
    if not losses:
        return "None of them was evaluated on a test set of the coordinator's."
    best, name = min(losses)
    lowest = f"The lowest loss on the test set is {best:.3f}, of {name}."
    bases = _bases(runs, lambda scores: scores.loss)
    if len(bases) > 1:
        # Two test sets, or two bases on one: the folders do not say which.
        lowest += (
            f" But the untouched bases had {min(bases):.3f} to {max(bases):.3f}: unless the runs share a "
            "test set, their losses do not compare."
        )
    return lowest


def _bases(runs: Sequence[RunRecord], value: Callable[[Scores], float | None]) -> set[float]:
    at_base = [value(run.base) for run in runs if run.base is not None]
    return {round(base, 4) for base in at_base if base is not None and math.isfinite(base)}


def _curves(
    runs: Sequence[RunRecord],
    names: Sequence[str],
    key: str,
    *,
    title: str,
    unit: str,
    value: Callable[[Scores], float | None],
    caption: str,
    percent: bool = False,
) -> Picture | None:
    drawn = []
    for name, run in zip(names, runs, strict=True):
        points = [
            (at, known)
            for at, scores in run.evaluated
            if (known := value(scores)) is not None and math.isfinite(known)
        ]
        base = value(run.base) if run.base is not None else None
        if points:
            start = [(0, base)] if base is not None and math.isfinite(base) else []
            drawn.append((name, start + points))
    if not drawn:
        return None
    bases = _bases(runs, value)
    with drawing(key, height=3.6 + 0.24 * len(drawn)) as canvas:
        axes = canvas.axes
        for index, (name, points) in enumerate(drawn):
            axes.plot(
                *zip(*points, strict=True),
                color=SERIES[index % len(SERIES)],
                linestyle=DASHES[index // len(SERIES)],
                marker=marker(len(points)),
                # matplotlib leaves out of a legend what begins with an underscore.
                label=f"\u200b{name}" if name.startswith("_") else name,
            )
        for index, base in enumerate(sorted(bases)):
            label = "base" if index == 0 else None
            axes.axhline(base, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.3, label=label)
        axes.set_ylabel(unit)
        if percent:
            in_percent(axes)
        whole_rounds(axes, last=max(points[-1][0] for _, points in drawn))
        axes.set_xlim(left=-0.3)
        canvas.figure.legend(loc="outside upper left", ncols=1)
    told = ", ".join(f"{name} {points[-1][1]:.3f}" for name, points in drawn)
    return Picture(key, title, caption, f"{title} after the last round: {told}.", canvas.svg)


def _epsilons(runs: Sequence[RunRecord], names: Sequence[str]) -> Picture | None:
    spent = [
        (name, run.max_epsilon)
        for name, run in zip(names, runs, strict=True)
        if run.max_epsilon is not None
    ]
    if not spent:
        return None
    with drawing("epsilon", height=max(2.2, 1.05 + 0.36 * len(spent))) as canvas:
        axes = canvas.axes
        reach = max(value for _, value in spent)
        for row, (_, value) in enumerate(spent):
            axes.barh(row, value, height=0.6, color=BLUE)
            axes.text(value + 0.012 * reach, row, f"{value:.2f}", va="center", color=INK)
        limits = {
            run.settings.get("privacy.target-epsilon")
            for run in runs
            if run.max_epsilon is not None
        }
        for limit in limits if len(limits) == 1 else ():
            axes.axvline(float(limit or 0.0), color=ORANGE, linewidth=1.6, label="the target")
            canvas.figure.legend(loc="outside upper left")
        axes.set_yticks(range(len(spent)), [name for name, _ in spent])
        axes.set_ylim(len(spent) - 0.4, -0.6)
        axes.set_xlim(0, 1.16 * reach)
        axes.set_xlabel("epsilon, largest of the sites")
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        axes.tick_params(axis="y", labelcolor=INK)
    told = ", ".join(f"{name} {value:.2f}" for name, value in spent)
    return Picture(
        "epsilon",
        "Epsilon",
        "The largest of each run's sites. Runs on the same records add up: this is each run alone.",
        f"Largest epsilon: {told}.",
        canvas.svg,
    )


def _table(runs: Sequence[RunRecord], names: Sequence[str]) -> TextTable:
    rows = []
    for name, run in zip(names, runs, strict=True):
        base, final = run.base or Scores(), run.final or Scores()
        protected = run.max_epsilon is not None
        rows.append(
            (
                name,
                run.state.kind,
                run.method,
                f"{len(run.sites)}",
                f"{len(run.rounds)} of {run.rounds_planned}",
                number(base.loss),
                number(final.loss),
                number(final.token_accuracy, ".1%"),
                number(run.max_epsilon, ".2f") if protected or not run.privacy else "none",
                size(run.bytes_up + run.bytes_down),
                duration(run.wall_s),
                f"{len(warning_signs(run))}",
            )
        )
    return TextTable(
        "Side by side",
        (
            "run",
            "state",
            "method",
            "sites",
            "rounds",
            "loss, base",
            "loss",
            "accuracy",
            "epsilon",
            "sent",
            "time",
            "warnings",
        ),
        tuple(rows),
        words=3,
    )


def _differences(runs: Sequence[RunRecord], names: Sequence[str]) -> TextTable | None:
    """Return the settings in which the runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key != "run.uid")
    rows = [
        (key, *values)
        for key in keys
        if len(set(values := [str(run.settings.get(key, "")) for run in runs])) > 1
    ]
    if not rows:
        return None
    return TextTable("Settings that differ", ("setting", *names), tuple(rows), words=1 + len(runs))
