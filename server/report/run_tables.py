"""A run's sites, rounds and settings, as tables."""

from __future__ import annotations

from server.report.record import RunRecord, Scores
from server.report.tables import NOTHING, TextTable, number, size


def sites_table(run: RunRecord) -> TextTable | None:
    """Return what each site gave and spent."""
    if not run.sites:
        return None
    spent = {one.site: one for one in run.privacy}
    rows = []
    for site in run.sites:
        states = [one.presence[site] for one in run.rounds]
        own = spent.get(site)
        seconds = [one.train_seconds[site] for one in run.rounds if site in one.train_seconds]
        rows.append(
            (
                site,
                f"{states.count('took part')}",
                f"{states.count('refused')}",
                f"{states.count('late')}",
                f"{states.count('absent')}",
                number(sum(seconds) / len(seconds), ".1f") if seconds else NOTHING,
                NOTHING
                if own is None
                else ("none" if own.epsilon is None else f"{own.epsilon:.2f}"),
                number(own.cap if own else None, "g"),
                number(own.noise_multiplier if own else None, ".3g"),
                number(own.sample_rate if own else None, ".3g"),
            )
        )
    return TextTable(
        "What each site gave and spent",
        (
            "site",
            "took part",
            "refused",
            "late",
            "absent",
            "s a round",
            "epsilon",
            "may spend",
            "noise",
            "sampling rate",
        ),
        tuple(rows),
    )


def rounds_table(run: RunRecord) -> TextTable | None:
    """Return all rounds in numbers."""
    if not run.rounds:
        return None
    rows = []
    for one in run.rounds:
        scores = one.scores or Scores()
        spent = [value for value in one.epsilon.values() if value is not None]
        states = list(one.presence.values())
        rows.append(
            (
                str(one.number),
                number(scores.loss),
                number(scores.perplexity, ".2f"),
                number(scores.token_accuracy, ".1%"),
                number(max(spent) if spent else None, ".2f"),
                f"{states.count('took part')}",
                f"{states.count('refused') + states.count('late')}",
                number(one.discarded_energy, ".1%"),
                number(one.learning_rate, ".2g"),
                number(sum(one.seconds.values()), ".1f"),
                size(one.bytes_up),
                size(one.bytes_down),
            )
        )
    return TextTable(
        "All rounds",
        (
            "round",
            "loss",
            "perplexity",
            "accuracy",
            "epsilon",
            "merged",
            "missed",
            "discarded",
            "rate",
            "seconds",
            "up",
            "down",
        ),
        tuple(rows),
        words=0,
    )


def settings_table(run: RunRecord) -> TextTable:
    """Return run.toml."""
    rows = tuple((key, str(value)) for key, value in run.settings.items() if value != "")
    return TextTable("run.toml", ("setting", "value"), rows, words=2)
