"""A run's own pictures: quality, privacy, sites, cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from server.report.drawing import (
    AMBER,
    BLUE,
    GREEN,
    GRID,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    PINK,
    SKY,
    Picture,
    drawing,
    in_percent,
    marker,
    whole_rounds,
)
from server.report.reading import Presence, RunRecord, Scores, SitePrivacy

# More rounds, or names, than fit into a column of the page.
_MANY_ROUNDS, MANY_SITES = 40, 16
_PHASES = (("train", BLUE), ("wait", AMBER), ("merge", GREEN), ("evaluate", PINK))
_PRESENCES: tuple[tuple[Presence, str, str], ...] = (
    ("took part", BLUE, ""),
    ("refused", ORANGE, "xxxx"),
    ("late", AMBER, "////"),
    ("absent", GRID, ""),
)


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
        whole_rounds(axes, last=_last(run))
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
    alt = f"{title} over {_last(run)} rounds"
    if points:
        number, last = points[-1]
        alt += f": {said.format(last)} after round {number}"
        if base is not None:
            alt += f", base {said.format(base)}"
    return Picture(name, title, caption, f"{alt}.", canvas.svg)


def privacy_pictures(run: RunRecord) -> list[Picture]:
    """Return epsilon of each site beside what it may spend, and how it grew."""
    rows = [one for one in run.privacy if one.epsilon is not None]
    if not rows:
        return []
    found = [_spent(rows)]
    growth = [
        (one.number, max(known))
        for one in run.rounds
        if (known := [value for value in one.epsilon.values() if value is not None])
    ]
    if len(growth) > 1:
        with drawing("epsilon-rounds") as canvas:
            axes = canvas.axes
            axes.plot(*zip(*growth, strict=True), color=BLUE, marker=marker(len(growth)))
            limits = {one.cap for one in rows if one.cap is not None}
            for cap in limits if len(limits) == 1 else ():
                axes.axhline(cap, color=INK, linestyle=(0, (4, 3)), linewidth=1.3, label="cap")
                axes.legend(loc="lower right")
            axes.set_ylim(bottom=0)
            axes.set_ylabel("epsilon, largest of the sites")
            whole_rounds(axes, last=_last(run))
        found.append(
            Picture(
                "epsilon-rounds",
                "Epsilon by round",
                "Rounds compose to less than their sum: the first ones cost most.",
                f"The largest epsilon grows from {growth[0][1]:.2f} to {growth[-1][1]:.2f}.",
                canvas.svg,
            )
        )
    return found


def _spent(rows: Sequence[SitePrivacy]) -> Picture:
    many = len(rows) > MANY_SITES
    names, at = [one.site for one in rows], range(len(rows))
    spent = [one.epsilon or 0.0 for one in rows]
    caps = [one.cap for one in rows if one.cap is not None]
    reach = max([*spent, *caps, 0.1])
    with drawing("epsilon", height=3.4 if many else _rows_height(len(rows)), wide=many) as canvas:
        axes = canvas.axes
        # Many names stand upright, so that the picture stays low.
        bars, marks = (axes.bar, axes.hlines) if many else (axes.barh, axes.vlines)
        bars(at, spent, 0.62, color=BLUE)
        for own, color, label in (
            (False, INK, "the run's target"),
            (True, ORANGE, "site's own cap"),
        ):
            there = [row for row in at if rows[row].cap is not None and rows[row].own_cap == own]
            if there:
                marks(
                    [rows[row].cap or 0.0 for row in there],
                    [row - 0.42 for row in there],
                    [row + 0.42 for row in there],
                    color=color,
                    linewidth=2.2,
                    label=label,
                )
        if many:
            axes.set_xticks(at, names, rotation=90)
            axes.tick_params(axis="x", labelcolor=INK)
            axes.set_xlim(-0.8, len(rows) - 0.2)
            axes.set_ylim(0, 1.06 * reach)
            axes.set_ylabel("epsilon")
        else:
            for row, value in enumerate(spent):
                inside = value > 0.2 * reach
                axes.text(
                    value + (-0.012 if inside else 0.012) * reach,
                    row,
                    f"{value:.2f}",
                    va="center",
                    ha="right" if inside else "left",
                    color=PAPER if inside else INK,
                )
            axes.set_yticks(at, names)
            axes.tick_params(axis="y", labelcolor=INK)
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.set_xlim(0, 1.06 * reach)
            axes.set_xlabel("epsilon")
            axes.grid(axis="y", visible=False)
            axes.grid(axis="x", visible=True)
        if caps:
            canvas.figure.legend(loc="outside upper left", ncols=2)
    worst = max(rows, key=lambda one: one.epsilon or 0.0)
    return Picture(
        "epsilon",
        "Epsilon spent",
        "What each site has spent in this run, and the most it may. Smaller protects more; what its data "
        "set has spent in other runs comes on top.",
        f"Epsilon of {len(rows)} sites, at most {worst.epsilon:.2f} ({worst.site}).",
        canvas.svg,
        many,
    )


def site_pictures(run: RunRecord) -> list[Picture]:
    """Return who took part in which round, and how the sites' own training went."""
    found = []
    if run.rounds and run.sites:
        found.append(_participation(run))
    for kind, title, unit, caption in (
        (
            "train_loss",
            "Training loss by site",
            "nats per answer token",
            "What the sites release of their own training, outside epsilon.",
        ),
        (
            "train_seconds",
            "Training time by site",
            "seconds a round",
            "A round waits for its slowest site, up to federation.deadline-s.",
        ),
    ):
        lines = {
            site: points
            for site in run.sites
            if (
                points := [
                    (r.number, v[site]) for r in run.rounds if site in (v := getattr(r, kind))
                ]
            )
        }
        if lines:
            name = kind.replace("_", "-")
            found.append(_by_site(run, name, lines, title=title, unit=unit, caption=caption))
    return found


def _participation(run: RunRecord) -> Picture:
    count = len(run.rounds)
    wide = count > _MANY_ROUNDS
    with drawing("participation", height=_rows_height(len(run.sites)), wide=wide) as canvas:
        axes = canvas.axes
        gap = 0.06 if count <= _MANY_ROUNDS else 0.0
        for presence, color, hatch in _PRESENCES:
            boxes = _boxes(run, presence, gap=gap)
            if boxes:
                outline = Outline.make_compound_path(*boxes)
                style = {"hatch": hatch, "edgecolor": PAPER} if hatch else {"edgecolor": "none"}
                axes.add_patch(
                    PathPatch(outline, facecolor=color, linewidth=0.0, label=presence, **style)
                )
        axes.set_ylim(len(run.sites) - 0.4, -0.6)
        axes.set_yticks(range(len(run.sites)), run.sites)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.grid(visible=False)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        whole_rounds(axes, last=run.rounds[-1].number)
        axes.set_xlim(run.rounds[0].number - 0.5, run.rounds[-1].number + 0.5)
        canvas.figure.legend(loc="outside upper left", ncols=4, handlelength=1.1, columnspacing=1.2)
    replies = sum(one.presence[site] == "took part" for one in run.rounds for site in run.sites)
    possible = count * len(run.sites)
    return Picture(
        "participation",
        "Who took part",
        "A row for each site, a column for each round. Late: no answer in time; absent: not asked, or not "
        "there.",
        f"{replies} of {possible} possible updates were merged, from {len(run.sites)} sites in {count} "
        "rounds.",
        canvas.svg,
        wide,
    )


def _boxes(run: RunRecord, presence: Presence, *, gap: float) -> list[Outline]:
    """One outline for each stretch of rounds in which a site was so; single rounds where gaps are drawn."""
    boxes = []
    for row, site in enumerate(run.sites):
        start: int | None = None
        numbers = [one.number for one in run.rounds if one.presence.get(site) == presence]
        for index, number in enumerate(numbers):
            start = number if start is None else start
            goes_on = index + 1 < len(numbers) and numbers[index + 1] == number + 1
            if gap or not goes_on:
                left, right = start - 0.5 + gap, number + 0.5 - gap
                top, bottom = row - 0.40, row + 0.40
                boxes.append(
                    Outline(
                        [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
                    )
                )
                start = None
    return boxes


def _by_site(
    run: RunRecord,
    name: str,
    lines: Mapping[str, Sequence[tuple[int, float]]],
    *,
    title: str,
    unit: str,
    caption: str,
) -> Picture:
    colors = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY)
    few = len(lines) <= len(colors)
    with drawing(name) as canvas:
        axes = canvas.axes
        for index, (site, points) in enumerate(lines.items()):
            if few:
                axes.plot(
                    *zip(*points, strict=True),
                    color=colors[index],
                    linewidth=1.6,
                    marker=marker(len(points)),
                    markersize=3.5,
                    label=site,
                )
            else:
                label = "each site" if index == 0 else None
                axes.plot(
                    *zip(*points, strict=True), color=SKY, linewidth=0.7, alpha=0.5, label=label
                )
        if not few:
            by_round: dict[int, list[float]] = {}
            for points in lines.values():
                for number, value in points:
                    by_round.setdefault(number, []).append(value)
            means = [(number, fmean(by_round[number])) for number in sorted(by_round)]
            axes.plot(*zip(*means, strict=True), color=BLUE, label="mean")
        axes.set_ylabel(unit)
        if name == "train-seconds":
            axes.set_ylim(bottom=0)
        whole_rounds(axes, last=_last(run))
        canvas.figure.legend(loc="outside upper left", ncols=3, handlelength=1.3, columnspacing=1.2)
    last = {site: points[-1][1] for site, points in lines.items()}
    low, high = min(last, key=lambda s: last[s]), max(last, key=lambda s: last[s])
    alt = f"{title}; in the end from {last[low]:.3g} ({low}) to {last[high]:.3g} ({high})."
    return Picture(name, title, caption, alt, canvas.svg)


def cost_pictures(run: RunRecord) -> list[Picture]:
    """Return seconds by phase, bytes, discarded energy, learning rate and memory, round by round."""
    if not run.rounds:
        return []
    found = [_seconds(run), _traffic(run)]
    for name, title, unit, caption, scale, values in (
        (
            "energy",
            "Discarded energy",
            "share of squared singular values",
            "What cutting the merged update to the adapter's rank left out; 0 is exact.",
            1.0,
            [one.discarded_energy for one in run.rounds],
        ),
        (
            "rate",
            "Learning rate",
            "at the round's last step",
            "Follows train.schedule over the whole run, all rounds together.",
            1.0,
            [one.learning_rate for one in run.rounds],
        ),
        (
            "memory",
            "Memory",
            "GB, peak so far",
            "The coordinator's process; in a simulation the sites are in it.",
            1e-9,
            [one.memory_bytes for one in run.rounds],
        ),
    ):
        points = [
            (one.number, scale * float(value))
            for one, value in zip(run.rounds, values, strict=True)
            if value is not None
        ]
        if not points:
            continue
        with drawing(name) as canvas:
            axes = canvas.axes
            axes.plot(*zip(*points, strict=True), color=BLUE, marker=marker(len(points)))
            axes.set_ylim(0, 1.12 * max(max(value for _, value in points), 1e-12))
            axes.set_ylabel(unit)
            if name == "energy":
                in_percent(axes)
            whole_rounds(axes, last=_last(run))
        alt = f"{title}: from {points[0][1]:.3g} in the first round to {points[-1][1]:.3g} in the last."
        found.append(Picture(name, title, caption, alt, canvas.svg))
    return found


def _seconds(run: RunRecord) -> Picture:
    numbers = [one.number for one in run.rounds]
    with drawing("seconds") as canvas:
        below = [0.0] * len(numbers)
        for phase, color in _PHASES:
            values = [one.seconds.get(phase, 0.0) for one in run.rounds]
            _bars(canvas.axes, numbers, values, below=below, color=color, label=phase)
            below = [low + value for low, value in zip(below, values, strict=True)]
        canvas.axes.set_ylabel("seconds")
        whole_rounds(canvas.axes, last=_last(run))
        canvas.figure.legend(loc="outside upper left", ncols=4, handlelength=1.1, columnspacing=1.2)
    total = sum(below)
    shares = ", ".join(
        f"{phase} {sum(one.seconds.get(phase, 0.0) for one in run.rounds) / (total or 1.0):.0%}"
        for phase, _ in _PHASES
    )
    waits = (
        "Sites of a simulation train one after another, so that most of it is waiting."
        if run.simulated
        else "Waiting is for the slowest site and for Flower."
    )
    return Picture(
        "seconds",
        "Seconds by phase",
        f"Training is the slowest site's own word. {waits}",
        f"{total:.0f} seconds in {len(numbers)} rounds: {shares}.",
        canvas.svg,
    )


def _traffic(run: RunRecord) -> Picture:
    numbers = [one.number for one in run.rounds]
    most = max([one.bytes_up + one.bytes_down for one in run.rounds])
    scale, unit = next(
        (size, name)
        for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
        if most >= size or size == 1.0
    )
    with drawing("bytes") as canvas:
        up = [one.bytes_up / scale for one in run.rounds]
        down = [one.bytes_down / scale for one in run.rounds]
        _bars(
            canvas.axes, numbers, up, below=[0.0] * len(up), color=BLUE, label="up, from the sites"
        )
        _bars(canvas.axes, numbers, down, below=up, color=SKY, label="down, to the sites")
        canvas.axes.set_ylabel(f"{unit} a round")
        whole_rounds(canvas.axes, last=_last(run))
        canvas.figure.legend(loc="outside upper left", ncols=2, handlelength=1.1, columnspacing=1.2)
    return Picture(
        "bytes",
        "Data sent",
        "All sites together. Only adapters travel, and a signed message beside each.",
        f"{run.bytes_up:,} bytes up and {run.bytes_down:,} down in {len(numbers)} rounds.",
        canvas.svg,
    )


def _bars(
    axes: Axes,
    numbers: Sequence[int],
    values: Sequence[float],
    *,
    below: Sequence[float],
    color: str,
    label: str,
) -> None:
    if len(numbers) <= _MANY_ROUNDS:
        axes.bar(numbers, values, bottom=below, width=0.68, color=color, label=label)
        return
    # Bars this thin are a surface.
    tops = [low + value for low, value in zip(below, values, strict=True)]
    axes.fill_between(numbers, below, tops, step="mid", color=color, linewidth=0.0, label=label)


def _rows_height(rows: int) -> float:
    """Inches for so many names below each other."""
    return max(2.2, 1.05 + 0.25 * rows)


def _last(run: RunRecord) -> int:
    return run.rounds[-1].number if run.rounds else 1
