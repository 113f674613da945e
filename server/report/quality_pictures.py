"""Curves of central metrics over a run's rounds, each beside the untouched base."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from server.report.drawing import (
    AMBER,
    BLUE,
    MUTED,
    Picture,
    drawing,
    in_percent,
    marker,
    whole_rounds,
)
from server.report.record import RunRecord, Scores


def quality_pictures(run: RunRecord) -> list[Picture]:
    """Return the curves of central metrics, each beside the untouched base."""
    if not run.evaluated and not any(one.train_loss for one in run.rounds):
        return []
    found = [
        _curve(
            run,
            "loss",
            title="Loss",
            unit="nats per answer token",
            value=lambda scores: scores.loss,
            caption="Lower is better. The solid line is the model on the coordinator's test set after each "
            "round, the dashed one the untouched base.",
            training=True,
        ),
        _curve(
            run,
            "accuracy",
            title="Token accuracy",
            unit="share of answer tokens",
            value=lambda scores: scores.token_accuracy,
            caption="How many of the answers' tokens the model names first; higher is better.",
            percent=True,
        ),
        _curve(
            run,
            "perplexity",
            title="Perplexity",
            unit="perplexity, log scale",
            value=lambda scores: scores.perplexity,
            caption="Among how many tokens the model wavers, so to speak; lower is better.",
            log=True,
        ),
    ]
    return [picture for picture in found if picture is not None]


def _curve(
    run: RunRecord,
    name: str,
    *,
    title: str,
    unit: str,
    value: Callable[[Scores], float | None],
    caption: str,
    training: bool = False,
    percent: bool = False,
    log: bool = False,
) -> Picture | None:
    points = [
        (number, known)
        for number, scores in run.evaluated
        if (known := value(scores)) is not None and math.isfinite(known)
    ]
    trained = [(one.number, fmean(one.train_loss.values())) for one in run.rounds if one.train_loss]
    trained = trained if training else []
    if not points and not trained:
        return None
    base = value(run.base) if run.base is not None else None
    said = "{:.1%}" if percent else "{:.3f}"
    with drawing(name) as canvas:
        axes = canvas.axes
        if trained:
            axes.plot(
                *zip(*trained, strict=True), color=AMBER, linewidth=1.3, label="training, mean"
            )
        if points:
            # The base is round 0 of the same curve.
            start = [(0, base)] if base is not None and math.isfinite(base) else []
            axes.plot(
                *zip(*start, *points, strict=True),
                color=BLUE,
                marker=marker(len(points)),
                label="this run",
            )
        if base is not None and math.isfinite(base):
            axes.axhline(base, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.3, label="base")
        whole_rounds(axes, last=run.last_round)
        axes.set_xlim(left=-0.3 if points and base is not None else 0.6)
        axes.set_ylabel(unit)
        if percent:
            in_percent(axes)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.legend(loc="best")
    alt = f"{title} over {run.last_round} rounds"
    if points:
        number, last = points[-1]
        alt += f": {said.format(last)} after round {number}"
        if base is not None:
            alt += f", base {said.format(base)}"
    return Picture(name, title, caption, f"{alt}.", canvas.svg)
