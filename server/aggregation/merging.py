"""The merge: module after module, so that memory holds one module's factors of all sites at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from common.adapter import AdapterState, FactorSource, LoraPair
from common.errors import ShapeError
from server.aggregation.by_module import map_modules
from server.aggregation.methods import METHODS
from server.aggregation.robust import update_shares
from server.aggregation.svd import balanced_split
from server.aggregation.target import Target, target_of
from server.aggregation.types import (
    Cut,
    Merged,
    MergedModule,
    MergeReport,
    MergeRules,
    ModuleReport,
    SiteUpdate,
)
from server.lowrank import truncated_svd
from server.products import squared_norm


def merge(
    current: AdapterState,
    updates: Sequence[SiteUpdate],
    *,
    rules: MergeRules,
    velocity: AdapterState | None = None,
) -> Merged:
    """Return the next global adapter.

    current: the global adapter. velocity: what the last merge returned, None before the first.
    Raises ShapeError when there is nothing to merge, an update does not fit, or the result is not finite.
    """
    started = time.perf_counter()
    shares = update_shares(current, updates, rules=rules)
    merged = list(merge_modules(current, updates, shares=shares, rules=rules, velocity=velocity))
    pairs = {module.name: module.pair for module in merged}
    if METHODS[rules.method].grows:
        pairs = _at_one_rank(pairs, merged, least=_rank(rules, updates))
    speeds = {one.name: one.velocity for one in merged if one.velocity is not None}
    by_site = {update.site: share for update, share in zip(updates, shares, strict=True)}
    state = AdapterState(pairs, current.scaling, current.own_scalings)
    if not state.is_finite():
        raise ShapeError(
            "the merged adapter holds values that are not finite; nothing of this round is kept. See "
            "update_norm in history.jsonl for the site that stands out, shut it out (consilium server "
            "exclude) and continue with --resume"
        )
    return Merged(
        state,
        replace(
            merge_report(merged, method=rules.method),
            shares=by_site,
            seconds=time.perf_counter() - started,
        ),
        AdapterState(speeds, current.scaling, current.own_scalings) if speeds else None,
    )


def merge_modules(
    current: FactorSource,
    updates: Sequence[SiteUpdate],
    *,
    shares: Sequence[float],
    rules: MergeRules,
    velocity: FactorSource | None = None,
) -> Iterator[MergedModule]:
    """Return the modules of the next global adapter, in the order of their names.

    shares: from `update_shares`. Raises ShapeError as `merge` does.
    """
    cut, rank = METHODS[rules.method].cut, _rank(rules, updates)

    def merge_module(name: str) -> MergedModule:
        mean = target_of(name, current, updates, shares, rank=rank)
        if rules.momentum == 0.0:
            done = cut(mean)
            return MergedModule(name, done.pair, _report(done, mean, done.total_energy))
        target, speed = _with_momentum(
            mean, momentum=rules.momentum, before=None if velocity is None else velocity.pair(name)
        )
        done = cut(target)
        mean_energy = squared_norm(mean.lefts, mean.rights)
        return MergedModule(name, done.pair, _report(done, mean, mean_energy), speed)

    return map_modules(merge_module, current.modules)


def _rank(rules: MergeRules, updates: Sequence[SiteUpdate]) -> int:
    return rules.rank or max((update.returned.rank for update in updates), default=0)


def merge_report(modules: Sequence[MergedModule], *, method: str) -> MergeReport:
    """Return what a merge did to all modules together; shares and seconds are left empty."""
    total = sum(one.report.total_energy for one in modules)
    discarded = {one.name: _share(one.report) for one in modules}
    worst = max(discarded, key=lambda name: discarded[name])
    ranks = sorted(one.report.live_rank for one in modules)
    mean = sum(one.report.mean_energy for one in modules)
    bias = sum(one.report.bias_energy for one in modules)
    return MergeReport(
        method=method,
        factor_bias=(bias / mean) ** 0.5 if mean > 0 else 0.0,
        discarded_energy=(
            sum(one.report.discarded_energy for one in modules) / total if total > 0 else 0.0
        ),
        worst_module=worst,
        worst_discarded_energy=discarded[worst],
        live_ranks=(ranks[0], int(statistics.median_low(ranks)), ranks[-1]),
        shares={},
        seconds=0.0,
    )


def _share(report: ModuleReport) -> float:
    return report.discarded_energy / report.total_energy if report.total_energy > 0 else 0.0


def _report(done: Cut, mean: Target, mean_energy: float) -> ModuleReport:
    return ModuleReport(
        total_energy=done.total_energy,
        discarded_energy=done.discarded_energy,
        mean_energy=mean_energy,
        bias_energy=mean.bias_energy(mean_energy),
        live_rank=done.live_rank,
    )


def _with_momentum(
    mean: Target, *, momentum: float, before: LoraPair | None
) -> tuple[Target, LoraPair]:
    """Return the target W_g + V' and V' = trunc_r(beta V + sum_k c_k D_k) (DESIGN section 6).

    mean: the target without momentum. before: V.
    The server's momentum of FedAvgM (1909.06335, section 4) on whole updates; V is kept in factors.
    """
    scaling = np.float64(mean.scaling)
    sb, a = mean.current.B * scaling, mean.current.A.astype(np.float64)
    lefts, rights = map(list, mean.change)
    if before is not None:
        lefts.append(before.B * (momentum * scaling))
        rights.append(before.A.astype(np.float64))
    svd = truncated_svd(lefts, rights, rank=mean.current.rank)
    speed = balanced_split(svd, scaling=mean.scaling, name=mean.name, fresh=False)
    moved = (speed.B * scaling, speed.A.astype(np.float64))
    return replace(mean, lefts=(sb, moved[0]), rights=(a, moved[1])), speed


def _at_one_rank(
    pairs: dict[str, LoraPair], modules: Sequence[MergedModule], *, least: int
) -> dict[str, LoraPair]:
    """Bring modules to the highest rank that one of them needs: zeros beyond what it has, none beyond all."""
    needed = {one.name: _needed(one.pair) for one in modules}
    rank = max(least, *needed.values())
    return {name: _padded(pair, rank) for name, pair in pairs.items()}


def _needed(pair: LoraPair) -> int:
    used = np.flatnonzero(pair.B.any(axis=0))
    return int(used[-1]) + 1 if len(used) else 0


def _padded(pair: LoraPair, rank: int) -> LoraPair:
    extra = max(0, rank - pair.rank)
    return LoraPair(
        np.pad(pair.A[:rank], ((0, extra), (0, 0))), np.pad(pair.B[:, :rank], ((0, 0), (0, extra)))
    )
