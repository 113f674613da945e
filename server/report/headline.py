"""What came of a run, in a sentence and in five figures."""

from __future__ import annotations

import math
from dataclasses import dataclass

from server.report.record import RunRecord, Scores
from server.report.tables import NOTHING, duration, number, size


@dataclass(frozen=True, slots=True)
class Card:
    """One key figure. note: what it is to be read beside."""

    label: str
    value: str
    note: str


def outcome(run: RunRecord) -> str:
    """Return in one sentence what came of a run."""
    done = run.rounds[-1].number if run.rounds else 0
    rounds = f"{done} round{'' if done == 1 else 's'}"
    if run.state.kind in ("running", "waiting"):
        start = f"The run goes: {done} of {run.rounds_planned} rounds are done"
    elif run.state.kind == "finished":
        start = f"{_capital(_count(len(run.sites), 'site'))} trained together for {rounds}"
    else:
        start = f"The run ended early, after {done} of {run.rounds_planned} rounds"
    base = run.base.loss if run.base else None
    final = run.final.loss if run.final else None
    told = ""
    if base is not None and final is not None and base > 0 and math.isfinite(final):
        way = "lower" if final <= base else "higher"
        told = f"; on the test set the loss is {abs(final / base - 1):.0%} {way} than the untouched base's"
    return f"{start}{told}{_guarantee(run)}."


def _guarantee(run: RunRecord) -> str:
    if not run.privacy:
        return ""
    spent = run.max_epsilon
    if spent is None:
        return ", without differential privacy"
    return f", with epsilon at most {spent:.2f} for each {run.privacy[0].unit}"


def cards(run: RunRecord) -> list[Card]:
    """Return the key figures of a run."""
    base, final = run.base or Scores(), run.final or Scores()
    spent = run.max_epsilon
    protected = [one for one in run.privacy if one.epsilon is not None]
    replies = sum(one == "took part" for each in run.rounds for one in each.presence.values())
    possible = len(run.rounds) * len(run.sites)
    return [
        Card("Loss", number(final.loss), f"base {number(base.loss)}"),
        Card(
            "Token accuracy",
            number(final.token_accuracy, ".1%"),
            f"base {number(base.token_accuracy, '.1%')}",
        ),
        Card(
            "Epsilon",
            number(spent, ".2f") if spent is not None else ("none" if run.privacy else NOTHING),
            f"at most; delta {protected[0].delta:g}, {protected[0].unit}"
            if spent is not None and protected
            else "no differential privacy"
            if run.privacy
            else "nothing spent yet",
        ),
        Card(
            "Took part",
            f"{replies / possible:.0%}" if possible else NOTHING,
            f"{_count(len(run.sites), 'site')}, {len(run.rounds)} of {run.rounds_planned} rounds",
        ),
        Card("Time", duration(run.wall_s), f"{size(run.bytes_up + run.bytes_down)} sent"),
    ]


def _count(count: int, noun: str) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    said = words[count] if count < len(words) else f"{count:,}"
    return f"{said} {noun}{'' if count == 1 else 's'}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
