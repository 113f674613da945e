"""The numbers of a report as tables and cards of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from server.report.reading import RunRecord, Scores
from server.report.results import Attack, Evaluation, Federated, ModelScores, SiteScores

NOTHING = "–"


@dataclass(frozen=True, slots=True)
class Card:
    """One key figure. note: what it is to be read beside."""

    label: str
    value: str
    note: str


@dataclass(frozen=True, slots=True)
class TextTable:
    """Cells are text; the first `words` columns are words, the others numbers. marked: rows to point out."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    marked: frozenset[int] = frozenset()


def number(value: float | None, form: str = ".3f") -> str:
    """Return a number as text."""
    if value is None:
        return NOTHING
    return (
        format(value, form) if math.isfinite(value) else ("infinite" if value > 0 else "no number")
    )


def size(size_bytes: float) -> str:
    """Return a number of bytes as people say it."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes:.0f} B"


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


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


def metrics_table(run: RunRecord) -> TextTable | None:
    """Return every metric of the result beside that of the untouched base."""
    evaluation = run.evaluation
    base = evaluation.models.base if evaluation else ModelScores()
    final = evaluation.models.final if evaluation else ModelScores()
    language = (base.language, final.language)
    if language[0].loss is None or language[1].loss is None:
        if run.base is None or run.final is None:
            return None
        pair: tuple[object, object] = (run.base, run.final)
    else:
        pair = language
    rows = list(_metric_rows(pair, _LANGUAGE))
    if base.generation and final.generation:
        rows += _metric_rows((base.generation, final.generation), _GENERATION)
    if base.options and final.options:
        rows += _metric_rows((base.options, final.options), _OPTIONS)
    records = f" on {evaluation.records:,} records" if evaluation and evaluation.records else ""
    return TextTable(
        f"On the coordinator's test set{records}",
        ("metric", "base", "this run", "change"),
        tuple(rows),
    )


_LANGUAGE = (
    ("loss", "Loss (lower is better)", ".3f"),
    ("perplexity", "Perplexity (lower is better)", ".2f"),
    ("token_accuracy", "Token accuracy", ".1%"),
)
_GENERATION = (
    ("exact_match", "Exact match", ".1%"),
    ("token_f1", "Token F1", ".1%"),
    ("rouge_l", "ROUGE-L", ".3f"),
    ("bleu", "BLEU", ".3f"),
)
_OPTIONS = (("accuracy", "Accuracy over labels", ".1%"), ("macro_f1", "Macro F1", ".3f"))


def _metric_rows(
    pair: tuple[object, object], metrics: tuple[tuple[str, str, str], ...]
) -> Iterator[tuple[str, ...]]:
    for name, said, form in metrics:
        before: float | None = getattr(pair[0], name)
        after: float | None = getattr(pair[1], name)
        if before is None and after is None:
            continue
        change = NOTHING
        if before is not None and after is not None:
            percent = form.endswith("%")
            change = (
                f"{100 * (after - before):+.1f} points" if percent else f"{after - before:+{form}}"
            )
        yield (said, number(before, form), number(after, form), change)


def groups_table(evaluation: Evaluation) -> TextTable | None:
    """Return each group's metrics beside the base's, the worst one pointed out."""
    final = evaluation.models.final.groups
    if not final:
        return None
    base = {one.group: one for one in evaluation.models.base.groups}
    rows = []
    for one in final:
        before = base.get(one.group)
        rows.append(
            (
                one.group,
                f"{one.records:,}",
                number(before.loss if before else None),
                number(one.loss),
                number(before.token_accuracy if before else None, ".1%"),
                number(one.token_accuracy, ".1%"),
            )
        )
    worst = [row for row, one in enumerate(final) if one.group == evaluation.worst_group]
    named = f"; {evaluation.worst_group} is served worst" if worst else ""
    return TextTable(
        f"By {evaluation.group_column or 'group'}{named}",
        ("group", "records", "loss, base", "loss", "accuracy, base", "accuracy"),
        tuple(rows),
        marked=frozenset(worst),
    )


def confusion_table(evaluation: Evaluation) -> TextTable | None:
    """Return how often which label was taken for which."""
    options = evaluation.models.final.options
    if options is None or not options.confusion:
        return None
    return TextTable(
        "Confusion: rows are true, columns what the model chose",
        ("true", *options.labels),
        tuple(
            (label, *(f"{count:,}" for count in counts))
            for label, counts in zip(options.labels, options.confusion, strict=False)
        ),
    )


def federated_table(federated: Federated) -> TextTable:
    """Return what the sites measured on their own records."""

    def row(name: str, one: SiteScores) -> tuple[str, ...]:
        return (
            name,
            f"{one.records:,}",
            number(one.base_loss),
            number(one.loss),
            number(one.base_token_accuracy, ".1%"),
            number(one.token_accuracy, ".1%"),
        )

    rows = [row(name, one) for name, one in sorted(federated.sites.items())]
    if federated.all is not None:
        rows.append(row("all", federated.all))
    return TextTable(
        "At the sites, on their own records: counts and sums only, and outside epsilon",
        ("site", "records", "loss, base", "loss", "accuracy, base", "accuracy"),
        tuple(rows),
    )


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


def attack_tables(attack: Attack) -> list[TextTable]:
    """Return what the audits measured."""
    found = []
    if attack.audits:
        found.append(
            TextTable(
                "Lower bounds on epsilon, each from one training run",
                ("audit", "canaries", "guesses", "correct", "epsilon at least", "ledger"),
                tuple(
                    (
                        f"{one.name} ({one.confidence:.0%})",
                        f"{one.canaries:,}",
                        f"{one.guesses:,}",
                        f"{one.correct:,}",
                        number(one.epsilon_lower, ".2f"),
                        number(one.ledger_epsilon_at_delta, ".2f"),
                    )
                    for one in attack.audits
                ),
            )
        )
    if attack.membership:
        found.append(
            TextTable(
                "Membership tests; 0.500 and 1.0% are guessing",
                ("test", "members", "others", "AUC", "found at 1% false alarms"),
                tuple(
                    (
                        f"{one.name} ({one.confidence:.0%})",
                        f"{one.members:,}",
                        f"{one.nonmembers:,}",
                        _interval(one.auc, lambda value: f"{value:.3f}"),
                        _interval(one.tpr_at_1pct_fpr, lambda value: f"{value:.1%}"),
                    )
                    for one in attack.membership
                ),
            )
        )
    planted = attack.planted
    if planted is not None:
        found.append(
            TextTable(
                "Planted identifiers",
                ("planted", "prompts", "samples each", "said by the model", "said by the base"),
                (
                    (
                        f"{planted.planted:,}",
                        f"{planted.prompts:,}",
                        f"{planted.samples_per_prompt:,}",
                        f"{planted.reproduced:,}",
                        f"{planted.reproduced_by_base:,}",
                    ),
                ),
                words=0,
            )
        )
    return found


def _interval(value: tuple[float, float, float] | None, said: Callable[[float], str]) -> str:
    if value is None:
        return NOTHING
    return f"{said(value[0])} ({said(value[1])} to {said(value[2])})"


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


def _count(count: int, noun: str) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    said = words[count] if count < len(words) else f"{count:,}"
    return f"{said} {noun}{'' if count == 1 else 's'}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
