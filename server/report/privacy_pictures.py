"""What a run has spent of epsilon: each site beside what it may, and how it grew."""

from __future__ import annotations

from collections.abc import Sequence

from server.report.drawing import (
    BLUE,
    INK,
    MANY_SITES,
    ORANGE,
    PAPER,
    Picture,
    drawing,
    marker,
    rows_height,
    whole_rounds,
)
from server.report.record import RunRecord, SitePrivacy

# What bounds a site's epsilon, by whether it is the site's own.
_OF_CAP = {False: "the run's target", True: "site's own cap"}


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
            limits = {(one.cap, one.own_cap) for one in rows if one.cap is not None}
            for cap, own in limits if len(limits) == 1 else ():
                axes.axhline(
                    cap,
                    color=ORANGE if own else INK,
                    linestyle=(0, (4, 3)),
                    linewidth=1.3,
                    label=_OF_CAP[own],
                )
                axes.legend(loc="lower right")
            axes.set_ylim(bottom=0)
            axes.set_ylabel("epsilon, largest of the sites")
            whole_rounds(axes, last=run.last_round)
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
    with drawing("epsilon", height=3.4 if many else rows_height(len(rows)), wide=many) as canvas:
        axes = canvas.axes
        # Many names stand upright, so that the picture stays low.
        bars, marks = (axes.bar, axes.hlines) if many else (axes.barh, axes.vlines)
        bars(at, spent, 0.62, color=BLUE)
        for own, color in ((False, INK), (True, ORANGE)):
            there = [row for row in at if rows[row].cap is not None and rows[row].own_cap == own]
            if there:
                marks(
                    [rows[row].cap or 0.0 for row in there],
                    [row - 0.42 for row in there],
                    [row + 0.42 for row in there],
                    color=color,
                    linewidth=2.2,
                    label=_OF_CAP[own],
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
        "What each site had spent in this run by its last update that was merged, and the most it may. "
        "Smaller protects more; what it spent on later updates that were refused or came late, and its data "
        "set in other runs, comes on top.",
        f"Epsilon of {len(rows)} sites, at most {worst.epsilon:.2f} ({worst.site}).",
        canvas.svg,
        many,
    )
