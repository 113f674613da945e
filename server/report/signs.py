"""What a reader should be warned of, as rules that look at a run's numbers and nothing else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

from server.audit_verdict import exceeds_ledger, is_blind
from server.report.record import RunRecord

# So many evaluations in a row must rise while training still falls.
_RISES = 3
# A site is slow at so many times the others' median, and by so many seconds.
_SLOW_TIMES, _SLOW_BY_S = 3.0, 1.0
# A site misses much at so many rounds, and that share of all rounds, more than the others' median.
_MISSES, _MISSED_SHARE = 2, 0.25
# Share of the update's energy that truncation left out, in the mean of so many last rounds.
_MUCH_DISCARDED, _LAST_ROUNDS = 0.3, 3
# A group of fewer test records may be worse by chance.
_FEW_RECORDS = 20
# So many sites are named; the rest are counted.
_NAMED = 4
_CUSTOMARY_EPSILON = 8.0
# What rounding of an accountant's search may leave over a cap.
_CAP_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Sign:
    """One warning. serious: the result, or its protection, should not be relied upon as it is."""

    title: str
    text: str
    serious: bool = False


def warning_signs(run: RunRecord) -> tuple[Sign, ...]:
    """Return what to be warned of, serious signs first."""
    found = [
        sign
        for rule in (
            _ended_badly,
            _protection_broken,
            _audit_is_blind,
            _diverged,
            _over_fitted,
            _beyond_caps,
            _unprotected,
            _said_what_was_planted,
            _worse_for_a_group,
            _slow_sites,
            _missing_sites,
            _refused_sites,
            _truncated,
        )
        for sign in rule(run)
    ]
    return tuple(sorted(found, key=lambda sign: not sign.serious))


def _ended_badly(run: RunRecord) -> Iterator[Sign]:
    if run.state.kind in ("stopped", "gave-up"):
        yield Sign(
            "The run did not finish",
            f"It ended after round {run.state.rounds_done} of {run.rounds_planned} "
            f"({run.state.code}): {run.state.message}",
            serious=True,
        )


def _protection_broken(run: RunRecord) -> Iterator[Sign]:
    for audit in run.attack.audits if run.attack else ():
        low, stated = audit.epsilon_lower, audit.ledger_epsilon_at_delta
        if exceeds_ledger(low, stated):
            yield Sign(
                "An audit contradicts the ledger",
                f"{audit.name}: epsilon is at least {low:.2f} at {audit.confidence:.0%} confidence, and the "
                f"ledger says {stated:.2f}; the protection does not do what it says.",
                serious=True,
            )


def _audit_is_blind(run: RunRecord) -> Iterator[Sign]:
    for audit in run.attack.audits if run.attack else ():
        shown = audit.epsilon_rehearsed
        if is_blind(audit.epsilon_lower, shown):
            yield Sign(
                "An audit saw nothing at all",
                f"{audit.name}: training as it is claimed shows about {shown:.2f}, so the canaries may "
                "not have reached it; it is no sign of protection.",
            )


def _diverged(run: RunRecord) -> Iterator[Sign]:
    for number, scores in run.evaluated:
        if scores.loss is not None and not math.isfinite(scores.loss):
            yield Sign(
                "The model diverged",
                f"The central loss of round {number} is no number; lower train.learning-rate.",
                serious=True,
            )
            return
    base = run.base.loss if run.base else None
    final = run.final.loss if run.final else None
    if base is not None and final is not None and final > base:
        yield Sign(
            "Worse than the base",
            f"The central loss is {final:.3f}, and that of the untouched base {base:.3f}: training did harm, "
            "or the test set is of another kind than the sites' records.",
            serious=True,
        )


def _over_fitted(run: RunRecord) -> Iterator[Sign]:
    points = [
        (one.number, one.scores.loss, one.train_loss.values())
        for one in run.rounds
        if one.scores is not None and one.scores.loss is not None
    ][-_RISES - 1 :]
    if len(points) <= _RISES:
        return
    losses = [loss for _, loss, _ in points]
    rising = all(after > before for before, after in pairwise(losses))
    first, last = points[0][2], points[-1][2]
    still_falls = not first or not last or fmean(last) < fmean(first)
    if rising and still_falls:
        yield Sign(
            "Over-fitting",
            f"The central loss has risen for {_RISES} evaluations in a row, from {losses[0]:.3f} after round "
            f"{points[0][0]} to {losses[-1]:.3f}, while training went on. evaluation.patience stops in time; "
            'export.round = "best" hands out the best round.',
        )


def _beyond_caps(run: RunRecord) -> Iterator[Sign]:
    for one in run.privacy:
        if one.epsilon is None or one.cap is None:
            continue
        if one.epsilon > one.cap * (1 + _CAP_TOLERANCE):
            whose = "its own cap" if one.own_cap else "the run's target"
            yield Sign(
                "More epsilon than allowed",
                f"{one.site} has spent {one.epsilon:.2f}, and {whose} is {one.cap:g}.",
                serious=True,
            )
    spent = run.max_epsilon
    if spent is not None and spent > _CUSTOMARY_EPSILON * (1 + _CAP_TOLERANCE):
        yield Sign(
            "A large epsilon",
            f"Epsilon is {spent:.2f}; above {_CUSTOMARY_EPSILON:g} the guarantee says little.",
        )


def _unprotected(run: RunRecord) -> Iterator[Sign]:
    bare = [one.site for one in run.privacy if one.epsilon is None]
    if bare:
        who = "Every site" if len(bare) == len(run.privacy) else ", ".join(bare)
        yield Sign(
            "No differential privacy",
            f"{who} trained without it: what the model has learned of a single record is not bounded.",
        )


def _said_what_was_planted(run: RunRecord) -> Iterator[Sign]:
    planted = run.attack.planted if run.attack else None
    if planted is not None and planted.reproduced > planted.reproduced_by_base:
        yield Sign(
            "Planted identifiers came out",
            f"{planted.reproduced} of {planted.planted} were said by the model, {planted.reproduced_by_base} "
            "by the base.",
            serious=True,
        )


def _worse_for_a_group(run: RunRecord) -> Iterator[Sign]:
    if run.evaluation is None:
        return
    before = {one.group: one.loss for one in run.evaluation.models.base.groups}
    for one in run.evaluation.models.final.groups:
        base = before.get(one.group)
        if base is not None and one.loss is not None and one.loss > base:
            yield Sign(
                "Worse for a group",
                f"{one.group}: loss {one.loss:.3f}, and {base:.3f} with the untouched base, on "
                f"{one.records} of the test records.",
                serious=one.records >= _FEW_RECORDS,
            )


def _slow_sites(run: RunRecord) -> Iterator[Sign]:
    seconds = {
        site: fmean(taken)
        for site in run.sites
        if (taken := [one.train_seconds[site] for one in run.rounds if site in one.train_seconds])
    }
    for site, own in seconds.items():
        others = [taken for other, taken in seconds.items() if other != site]
        if len(others) < 2:
            continue
        usual = median(others)
        if own > _SLOW_TIMES * usual and own > usual + _SLOW_BY_S:
            yield Sign(
                "A slow site",
                f"{site} trains for {own:.0f} s a round, the others for {usual:.1f} s in the median: all "
                "wait for it, up to federation.deadline-s.",
            )


def _missing_sites(run: RunRecord) -> Iterator[Sign]:
    # A site that was not drawn is not to blame.
    missed = {
        site: sum(one.presence[site] in ("late", "refused") for one in run.rounds)
        for site in run.sites
    }
    for site, own in missed.items():
        others = [count for other, count in missed.items() if other != site]
        if not others:
            continue
        more = own - median(others)
        if more >= _MISSES and more >= _MISSED_SHARE * len(run.rounds):
            yield Sign(
                "A site that lags",
                f"{site} is missing in {own} of {len(run.rounds)} rounds, the others in "
                f"{median(others):g} in the median; its records count the less.",
            )


def _refused_sites(run: RunRecord) -> Iterator[Sign]:
    why: dict[str, Counter[str]] = {}
    for one in run.rounds:
        for site, reason in one.reasons.items():
            if one.presence.get(site) == "refused":
                why.setdefault(site, Counter())[reason] += 1
    if not why:
        return
    worst = sorted(why.items(), key=lambda item: -item[1].total())
    told = "; ".join(
        f"{site}: {', '.join(f'{reason} ({_rounds(n)})' for reason, n in reasons.most_common())}"
        for site, reasons in worst[:_NAMED]
    )
    rest = len(worst) - _NAMED
    more = f"; and {rest} more sites, in the table below" if rest > 0 else ""
    yield Sign("Refused updates", f"Rounds went on without {told}{more}.")


def _rounds(count: int) -> str:
    return "1 round" if count == 1 else f"{count} rounds"


def _truncated(run: RunRecord) -> Iterator[Sign]:
    shares = [one.discarded_energy for one in run.rounds if one.discarded_energy is not None]
    last = shares[-_LAST_ROUNDS:]
    if last and fmean(last) > _MUCH_DISCARDED:
        yield Sign(
            "Much is lost in merging",
            f"Cutting the merged update to rank {run.settings.get('lora.rank', '?')} left out "
            f"{fmean(last):.0%} of its energy in the last rounds; raise lora.rank, or take a method that "
            "discards nothing (aggregation.method).",
        )
