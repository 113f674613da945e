"""A run's summary.json in a few sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def summary_sentences(summary: Mapping[str, Any]) -> list[str]:
    """Return what a person wants to know first of a run that has ended."""
    sentences = []
    central, rounds = summary["central"], summary["rounds"]
    if central["final"]:
        base, final = central["base"]["loss"], central["final"]["loss"]
        sentences.append(
            f"Central loss {base:.3f} -> {final:.3f} ({final / base - 1:+.0%}), perplexity "
            f"{central['base']['perplexity']:.1f} -> {central['final']['perplexity']:.1f}"
        )
    rows = [row for row in summary["privacy"].values() if row["epsilon"] is not None]
    if rows:
        sentences.append(
            f"Epsilon at most {max(row['epsilon'] for row in rows):.2f} at delta "
            f"{rows[0]['delta']:g}, at each of {len(rows)} sites"
        )
    else:
        sentences.append("Trained without differential privacy")
    sentences.append(
        f"{len(rounds)} rounds, {len(summary['sites'])} sites, {summary['wall_s']:.0f} s, "
        f"{summary['bytes_up'] / 1e6:.2f} MB up, {summary['bytes_down'] / 1e6:.2f} MB down"
    )
    return sentences
