"""Pictures of what the attacks found, and of the confusion between labels."""

from __future__ import annotations

from server.report.drawing import (
    BLUE,
    DASHES,
    GRID,
    INK,
    MUTED,
    ORANGE,
    SERIES,
    Picture,
    drawing,
)
from server.report.results import Attack

_FALSE_ALARMS = 0.01


def audit_pictures(attack: Attack) -> list[Picture]:
    """Return lower bounds beside the ledger, and the curve of each membership test."""
    found = []
    audits = [one for one in attack.audits if one.epsilon_lower is not None]
    if audits:
        with drawing("bounds", height=max(2.2, 1.3 + 0.5 * len(audits))) as canvas:
            axes = canvas.axes
            names = [one.name.replace(", ", ",\n") for one in audits]
            bounds = [one.epsilon_lower or 0.0 for one in audits]
            stated = [one.ledger_epsilon_at_delta for one in audits]
            reach = max([*bounds, *(one for one in stated if one is not None), 0.1])
            axes.barh(names, bounds, height=0.5, color=BLUE, label="measured, at least")
            for row, value in enumerate(bounds):
                axes.text(value + 0.015 * reach, row, f"{value:.2f}", va="center", color=INK)
            for row, limit in enumerate(stated):
                if limit is not None:
                    label = "ledger, at most" if row == 0 else "_"
                    axes.vlines(
                        limit, row - 0.36, row + 0.36, color=ORANGE, linewidth=2.2, label=label
                    )
            axes.set_ylim(len(audits) - 0.4, -0.6)
            axes.set_xlim(0, 1.12 * reach)
            axes.set_xlabel("epsilon")
            axes.grid(axis="y", visible=False)
            axes.grid(axis="x", visible=True)
            axes.tick_params(axis="y", labelcolor=INK)
            canvas.figure.legend(loc="outside upper left", ncols=2)
        told = "; ".join(
            f"{one.name}: at least {one.epsilon_lower:.2f}, ledger "
            + (
                "none"
                if one.ledger_epsilon_at_delta is None
                else f"{one.ledger_epsilon_at_delta:.2f}"
            )
            for one in audits
        )
        found.append(
            Picture(
                "bounds",
                "Measured against promised",
                "What an attacker who plants canaries can prove of the epsilon, beside what the ledger says. "
                "A bar beyond its mark would show that the protection is broken; a short bar proves nothing.",
                f"{told}.",
                canvas.svg,
            )
        )
    curves = [one for one in attack.membership if one.roc]
    if curves:
        with drawing("roc", height=3.6) as canvas:
            axes = canvas.axes
            low = 1e-3
            chance = [low, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
            axes.plot(
                chance, chance, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.3, label="chance"
            )
            for index, one in enumerate(curves):
                points = [(max(false, low), max(true, low)) for false, true in one.roc]
                axes.plot(
                    *zip(*points, strict=True),
                    color=SERIES[index % len(SERIES)],
                    linestyle=DASHES[index // len(SERIES) % len(DASHES)],
                    label=f"{one.name}, AUC {one.auc[0]:.3f}" if one.auc else one.name,
                )
            axes.axvline(_FALSE_ALARMS, color=GRID, linewidth=1.0)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlim(low, 1.0)
            axes.set_ylim(low, 1.05)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(lambda value, _: f"{value:g}")
                axis.set_minor_formatter(lambda value, _: "")
            axes.set_xlabel("false positive rate, log scale")
            axes.set_ylabel("true positive rate, log scale")
            axes.legend(loc="upper left")
        told = "; ".join(f"{one.name}, AUC {one.auc[0]:.3f}" for one in curves if one.auc)
        found.append(
            Picture(
                "roc",
                "Who was in the training data?",
                "How many members an attacker finds for how many false alarms. On the dashed line the attack "
                "guesses; what counts is the left, where alarms are few.",
                f"Curves of {len(curves)} membership tests: {told}.",
                canvas.svg,
            )
        )
    return found
