"""What a run costs, round by round: time, traffic, memory, and what merging loses."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from server.report.drawing import (
    AMBER,
    BLUE,
    GREEN,
    MANY_ROUNDS,
    PINK,
    SKY,
    Picture,
    drawing,
    in_percent,
    marker,
    whole_rounds,
)
from server.report.record import RunRecord

_PHASES = (("train", BLUE), ("wait", AMBER), ("merge", GREEN), ("evaluate", PINK))


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
            whole_rounds(axes, last=run.last_round)
        alt = f"{title}: from {points[0][1]:.3g} in the first round to {points[-1][1]:.3g} in the last."
        found.append(Picture(name, title, caption, alt, canvas.svg))
    return found


def _seconds(run: RunRecord) -> Picture:
    numbers = [one.number for one in run.rounds]
    # Where no site releases its seconds, nobody knows how much of the waiting is training.
    told = any(one.seconds.get("train") for one in run.rounds)
    phases = _PHASES if told else _PHASES[1:]
    with drawing("seconds") as canvas:
        below = [0.0] * len(numbers)
        for phase, color in phases:
            values = [one.seconds.get(phase, 0.0) for one in run.rounds]
            _bars(canvas.axes, numbers, values, below=below, color=color, label=phase)
            below = [low + value for low, value in zip(below, values, strict=True)]
        canvas.axes.set_ylabel("seconds")
        whole_rounds(canvas.axes, last=run.last_round)
        canvas.figure.legend(loc="outside upper left", ncols=4, handlelength=1.1, columnspacing=1.2)
    total = sum(below)
    shares = ", ".join(
        f"{phase} {sum(one.seconds.get(phase, 0.0) for one in run.rounds) / (total or 1.0):.0%}"
        for phase, _ in phases
    )
    waits = (
        "Sites of a simulation train one after another, so that most of it is waiting."
        if run.simulated
        else "Waiting is for the slowest site and for Flower."
    )
    return Picture(
        "seconds",
        "Seconds by phase",
        f"Training is the slowest site's own word. {waits}"
        if told
        else "Waiting is for the sites, which train and release no seconds of it, and for Flower.",
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
        whole_rounds(canvas.axes, last=run.last_round)
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
    if len(numbers) <= MANY_ROUNDS:
        axes.bar(numbers, values, bottom=below, width=0.68, color=color, label=label)
        return
    # Bars this thin are a surface.
    tops = [low + value for low, value in zip(below, values, strict=True)]
    axes.fill_between(numbers, below, tops, step="mid", color=color, linewidth=0.0, label=label)
