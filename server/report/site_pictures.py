"""Who took part in which round, and how the sites' own training went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline

from server.report.drawing import (
    AMBER,
    BLUE,
    GREEN,
    GRID,
    INK,
    MANY_ROUNDS,
    ORANGE,
    PAPER,
    PINK,
    SKY,
    Picture,
    drawing,
    marker,
    rows_height,
    whole_rounds,
)
from server.report.record import Presence, RunRecord

_PRESENCES: tuple[tuple[Presence, str, str], ...] = (
    ("took part", BLUE, ""),
    ("refused", ORANGE, "xxxx"),
    ("late", AMBER, "////"),
    ("absent", GRID, ""),
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
    wide = count > MANY_ROUNDS
    with drawing("participation", height=rows_height(len(run.sites)), wide=wide) as canvas:
        axes = canvas.axes
        gap = 0.06 if count <= MANY_ROUNDS else 0.0
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
        whole_rounds(axes, last=run.last_round)
        canvas.figure.legend(loc="outside upper left", ncols=3, handlelength=1.3, columnspacing=1.2)
    last = {site: points[-1][1] for site, points in lines.items()}
    low, high = min(last, key=lambda s: last[s]), max(last, key=lambda s: last[s])
    end = f"from {last[low]:.3g} ({low}) to {last[high]:.3g} ({high})"
    if len(last) == 1:
        end = f"{last[low]:.3g} ({low} alone)"
    alt = f"{title}; in the end {end}."
    return Picture(name, title, caption, alt, canvas.svg)
