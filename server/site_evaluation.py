"""Evaluation at the sites: each counts on test records of its own, and sends sums.

For a coordinator without test records. What comes is outside every epsilon, each site's policy allows it or
not, and a site does it once for each run. Nothing here is worth stopping a run for: whoever does not answer
is named.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from common.errors import ScreeningError
from common.metrics import TokenSums
from common.records import Reply, Task, seal_task
from server.evaluation.results import AtSites, SiteSums
from server.gathering import Member
from server.messenger import Answer, Messenger
from server.portions import Portions
from server.run_context import RunContext
from server.screening import answer_in, screen_reply, verified_reply

logger = logging.getLogger(__name__)

# More than any model's vocabulary is worth: ln(2^40).
_MAX_NATS = 28.0
# More test records than any hospital has. Sums of them cannot overflow where those of all sites are added.
_MAX_RECORDS = 1e8


def evaluate_at_sites(
    messenger: Messenger,
    run: RunContext,
    members: Sequence[Member],
    portions: Portions,
    *,
    server_round: int,
) -> AtSites:
    """Return what the members counted for an adapter, within federation.deadline-s.

    portions: of that adapter. server_round: that made it.
    """
    deadline_s = run.config.federation.deadline_s
    seen = run.audit.seen()
    tasks = {}
    for member in members:
        portion = portions.of(member)
        task = Task(
            kind="evaluate",
            run_uid=run.uid,
            site=member.site,
            server_round=server_round,
            attempt=1,
            expires_at=int(time.time() + deadline_s) + 1,
            base_digest=run.base_digest,
            adapter_digest=portion.digest,
            config={**run.config.for_sites(), **portion.settings()},
            seen=seen.get(member.site),
            audit_head=run.audit.head(),
        )
        run.audit.task_sent(task)
        tasks[member.node_id] = (task, seal_task(task, run.key, adapter=portion.data))
    messenger.send(tasks, ttl_s=deadline_s + 60)
    sites: dict[str, SiteSums] = {}
    refused = {member.site: "silent" for member in members}
    for answer in messenger.answers(deadline_s=deadline_s):
        site = answer.sent.task.site
        try:
            sites[site] = _sums_in(answer, run)
            del refused[site]
        except ScreeningError as error:
            refused[site] = error.reason
            logger.warning("evaluation: %s", error)
            if answer.message is None:
                messenger.forget(answer.sent.node_id)
    for site, reason in sorted(refused.items()):
        place = {"round": server_round, "site": site, "reason": reason}
        run.audit.note("refused", run=run.uid, attempt=1, **place)
    return AtSites(sites, refused)


def _sums_in(answer: Answer, run: RunContext) -> SiteSums:
    task = answer.sent.task
    if answer.message is None:
        raise ScreeningError("lost", f"{task.site} was gone and may have forgotten its task")
    envelope = answer_in(answer.message, who=task.site)
    roster = run.roster.current()
    reply = verified_reply(envelope, task=task, site=task.site, roster=roster)
    run.audit.replied(reply, task=task, size_bytes=envelope.size_bytes, seen=task.seen)
    screen_reply(reply)
    return screen_sums(reply, max_length=run.config.data.max_length)


def screen_sums(reply: Reply, *, max_length: int) -> SiteSums:
    """Return the sums in a reply. Raises ScreeningError "sums" for what no counting gives.

    max_length: of a record, in tokens. Counts come rounded to policy.metric-digits, which keeps their order
    and may double a product of two.
    """
    numbers = reply.numbers
    names = ("records", "tokens", "nll", "correct", "base-nll", "base-correct")
    missing = [name for name in names if f"evaluation-{name}" not in numbers]
    if missing:
        raise ScreeningError("sums", f"{reply.site} sent no evaluation-{missing[0]}")
    records, tokens, nll, correct, base_nll, base_correct = (
        numbers[f"evaluation-{name}"] for name in names
    )
    possible = (
        1 <= records <= _MAX_RECORDS
        and 1 <= tokens <= 2 * records * max_length
        and all(0 <= count <= tokens for count in (correct, base_correct))
        and all(0 <= total <= _MAX_NATS * tokens for total in (nll, base_nll))
    )
    if not possible:
        raise ScreeningError(
            "sums", f"{reply.site} sent sums that no counting gives; ask for its version"
        )
    return SiteSums(
        round(records),
        base=TokenSums(base_nll, round(base_correct), round(tokens)),
        final=TokenSums(nll, round(correct), round(tokens)),
    )
