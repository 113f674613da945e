"""What a model card is made from, and how it calls the sites."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from server.finished_run import FinishedRun
from server.release.base_license import BaseLicense
from server.release.evidence import Evidence


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card is made from. export: what export.json says. names: how each site is called in the card."""

    title: str
    run: FinishedRun
    evidence: Evidence
    export: Mapping[str, Any]
    license: BaseLicense
    names: Mapping[str, str]


def site_names(run: FinishedRun, *, named: bool) -> dict[str, str]:
    """Return how each site is called: by its name, or by a number that its name does not give away."""
    rows = run.summary["privacy"]
    sites = sorted({*run.summary["sites"], *rows})
    if named:
        return {site: site for site in sites}
    # By what they spent, and by chance where that is the same: in the order of their names, a number would
    # say something of the name.
    secrets.SystemRandom().shuffle(sites)
    order = sorted(sites, key=lambda site: _spent(rows.get(site)))
    return {site: f"site {number}" for number, site in enumerate(order, start=1)}


def group_names(groups: Iterable[str], names: Mapping[str, str]) -> dict[str, str]:
    """Return how each group of test records is called, which may be named like a hospital or a file.

    names: of the sites. Where these are numbered, so is every group that is none of them, in the given order.
    """
    named = all(site == shown for site, shown in names.items())
    others = [group for group in groups if group not in names]
    shown = {group: group if named else f"group {i}" for i, group in enumerate(others, start=1)}
    return {**names, **shown}


def _spent(row: Mapping[str, Any] | None) -> tuple[float, ...]:
    if row is None:
        return (math.inf,)
    epsilon = math.inf if row["epsilon"] is None else row["epsilon"]
    return (epsilon, row["delta"], row["steps"])
