"""The page: one HTML file that needs nothing else, from what was read and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from common.files import write_atomically
from server.report.audit_pictures import audit_pictures
from server.report.cost_pictures import cost_pictures
from server.report.drawing import MANY_SITES, Picture
from server.report.headline import cards, outcome
from server.report.markup import render
from server.report.privacy_pictures import privacy_pictures
from server.report.quality_pictures import quality_pictures
from server.report.reading import damage_in_words, read_run
from server.report.record import RunRecord
from server.report.result_tables import (
    attack_tables,
    confusion_table,
    federated_table,
    groups_table,
    metrics_table,
)
from server.report.run_tables import rounds_table, settings_table, sites_table
from server.report.signs import warning_signs
from server.report.site_pictures import site_pictures
from server.report.tables import TextTable
from server.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page. notes: sentences under its heading. tables: shown; folded: behind a click."""

    title: str
    notes: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[TextTable, ...] = ()
    folded: tuple[TextTable, ...] = ()


def write_report(run_dir: Path) -> Path:
    """Write a run's report into its folder and return its path. Raises ConfigError or DataError."""
    page = run_page(read_run(run_dir))
    path = RunFolder(run_dir, "").report
    write_atomically(path, page.encode())
    return path


def run_page(run: RunRecord, *, version: str = "") -> str:
    """Return a run's report. version: of a page that is served, see `render`.

    Raises DataError for numbers that no run writes and nobody can draw.
    """
    with damage_in_words(run.name):
        return render(
            "run.html.j2",
            title=run.name,
            version=version,
            run=run,
            outcome=outcome(run),
            cards=cards(run),
            signs=warning_signs(run),
            sections=[section for section in _sections(run) if _has_content(section)],
            questions=run.evaluation.questions if run.evaluation else (),
            made_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )


def _sections(run: RunRecord) -> Sequence[Section]:
    evaluation, attack = run.evaluation, run.attack
    quality = [metrics_table(run)]
    if evaluation is not None:
        quality += [groups_table(evaluation), confusion_table(evaluation)]
        quality += [federated_table(evaluation.federated)] if evaluation.federated else []
    sites = tuple(filter(None, [sites_table(run)]))
    many = len(run.sites) > MANY_SITES
    scope = []
    if attack is not None:
        ledger = attack.ledger
        spent = "no protection" if ledger.epsilon is None else f"epsilon {ledger.epsilon:.2f}"
        scope.append(
            f"Audited: {attack.kind}, site {attack.site}, trained with {spent}. "
            f"This is {attack.scope or 'an audit of the pipeline'}."
        )
    return (
        Section(
            "Quality",
            pictures=tuple(quality_pictures(run)),
            tables=tuple(table for table in quality if table is not None),
        ),
        Section("Privacy", pictures=tuple(privacy_pictures(run))),
        Section(
            "Attacks",
            tuple(scope),
            tuple(audit_pictures(attack)) if attack else (),
            tuple(attack_tables(attack)) if attack else (),
        ),
        Section(
            "Sites",
            pictures=tuple(site_pictures(run)),
            tables=() if many else sites,
            folded=sites if many else (),
        ),
        Section(
            "Cost",
            pictures=tuple(cost_pictures(run)),
            folded=tuple(filter(None, [rounds_table(run)])),
        ),
        Section("Settings", folded=(settings_table(run),)),
    )


def _has_content(section: Section) -> bool:
    return bool(section.pictures or section.tables or section.folded)
