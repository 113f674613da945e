"""The last step of a run: what is handed out, measured by whatever there is to measure it by."""

from __future__ import annotations

import logging
from collections.abc import Callable

from common.adapter import AdapterState
from common.config import RunConfig
from common.files import is_disk_full
from server.evaluation import AtSites, CentralCounts, Evaluation, compare_with_base
from server.history import History
from server.prepared_run import PreparedRun
from server.rounds import Federation
from server.run_folder import RunFolder

logger = logging.getLogger(__name__)


def evaluate_result(
    prepared: PreparedRun,
    exported: AdapterState,
    *,
    config: RunConfig,
    run_uid: str,
    server_round: int,
    at_sites: Callable[[AdapterState, int], AtSites] | None = None,
    counts: CentralCounts | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Return what an adapter is worth beside its base, on the central records and the fixed questions.

    server_round: that made it. at_sites: asks the sites too, where evaluation.at-sites wants it.
    counts, on_batch: see `compare_with_base`.
    """
    central = prepared.central
    models, answered = compare_with_base(
        prepared.base,
        exported,
        central,
        config=config,
        questions=prepared.questions,
        counts=counts,
        on_batch=on_batch,
    )
    wanted = at_sites is not None and config.evaluation.at_sites
    return Evaluation(
        run_uid=run_uid,
        server_round=server_round,
        adapter=exported.digest(),
        base=prepared.base.digest,
        records=0 if central is None else len(central),
        central=models,
        group_by="" if central is None else central.group_by,
        questions=answered,
        at_sites=at_sites(exported, server_round) if wanted and at_sites else None,
    )


def try_to_evaluate(
    prepared: PreparedRun,
    exported: AdapterState,
    folder: RunFolder,
    *,
    config: RunConfig,
    server_round: int,
    at_sites: Callable[[AdapterState, int], AtSites],
    counts: CentralCounts | None,
    history: History,
) -> None:
    """Write evaluation.json of what is handed out, or that it could not be measured, into the history.

    What was trained is worth more than its measure: a run ends well without. Raises what says that the disk
    is full.
    """
    try:
        evaluate_result(
            prepared,
            exported,
            config=config,
            run_uid=folder.run_uid,
            server_round=server_round,
            at_sites=at_sites,
            counts=counts,
        ).write(folder.evaluation)
    except Exception as error:
        if is_disk_full(error):
            raise
        history.record("not-evaluated", message=f"{type(error).__name__}: {error}")
        logger.error(
            "the result could not be evaluated (%s: %s); it is in %s, and `consilium server evaluate` tries "
            "again",
            type(error).__name__,
            error,
            folder.adapter,
        )


def evaluated_at_sites(
    federation: Federation, history: History, exported: AdapterState, server_round: int
) -> AtSites:
    """Return what the sites count, and write down who did."""
    counted = federation.evaluate_at_sites(exported, server_round=server_round)
    history.record(
        "evaluated-at-sites",
        round=server_round,
        sites=sorted(counted.sites),
        refused=dict(counted.refused),
    )
    return counted
