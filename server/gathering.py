"""Who takes part: nodes are asked who they are, and sites of the roster prove it.

The question carries the run's settings, so that a site can refuse a run, or wait for its hospital's
approval, before any work is done for it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Message

from common.errors import ProtocolError, QuorumError, ScreeningError
from common.records import (
    Reply,
    SiteHeads,
    Task,
    seal_task,
    unverified_reply_site,
)
from server.messenger import Messenger
from server.run_context import RunContext
from server.screening import (
    AWAITS_APPROVAL,
    FINAL_REFUSALS,
    answer_in,
    screen_reply,
    verified_reply,
)

logger = logging.getLogger(__name__)

# Once enough sites are there, so long the others may still take to introduce themselves.
_GRACE_S = 15.0
_DESCRIBE_DEADLINE_S = 300.0
_LOOK_AGAIN_S = 2.0
_TTL_MARGIN_S = 60.0
# A hospital's people decide: asking more often makes nobody faster.
_ASK_AGAIN_S = 10.0


@dataclass(frozen=True, slots=True)
class Member:
    """A site that is there now: its node, public size and the rank that it trains.

    max_rank: that it can hold in all, ranks that are sent along frozen among them.
    """

    site: str
    node_id: int
    declared_size: int
    rank: int
    max_rank: int


@dataclass(frozen=True, slots=True)
class _Awaiting:
    """A site whose hospital has yet to approve the run. due_s: when to ask it again (monotonic)."""

    site: str
    due_s: float


@dataclass(frozen=True, slots=True)
class _Refused:
    """A site that will not take part in this run, and why."""

    site: str
    reason: str


_Standing = Member | _Awaiting | _Refused


class Gathering:
    """The sites of one run, by what came of asking them."""

    def __init__(self, messenger: Messenger, run: RunContext) -> None:
        self._messenger = messenger
        self._run = run
        # By node; one of a site at most.
        self._standing: dict[int, _Standing] = {}
        # What the history and the audit log have already been told.
        self._sites: list[str] | None = None
        self._asked: set[int] = set()
        self._said: set[tuple[str, str]] = set()

    def gather(self) -> list[Member]:
        """Return the sites that are there, sorted by name, once there are min-sites of them.

        Raises QuorumError when too few come within federation.join-timeout-s (approval-timeout-s while
        one of them awaits its hospital's approval), and at once when too many refused for good.
        """
        settings = self._run.config.federation
        started, said = time.monotonic(), False
        while True:
            nodes = set(self._messenger.node_ids())
            self._describe(self._to_ask(nodes), present=len(self._members(nodes)))
            present = self._members(nodes)
            if len(present) >= settings.min_sites:
                return sorted(present, key=lambda member: member.site)
            self._check_hope()
            awaiting = self._awaiting(nodes)
            patience_s = settings.join_timeout_s
            if awaiting:
                patience_s = max(patience_s, settings.approval_timeout_s)
            left_s = started + patience_s - time.monotonic()
            if left_s <= 0:
                names = ", ".join(sorted(member.site for member in present))
                approval = f"{', '.join(awaiting)} await approval; " if awaiting else ""
                raise QuorumError(
                    f"{len(present)} of {settings.min_sites} sites came within {patience_s:.0f} s "
                    f"({names}); {approval}start the missing ones, or lower federation.min-sites"
                )
            if not said:
                said = True
                self._run.history.record("waiting", present=len(present), needed=settings.min_sites)
            time.sleep(min(_LOOK_AGAIN_S, left_s))

    def present(self) -> list[Member]:
        """Return the sites that are there now, sorted by name, however few; nobody is waited for."""
        nodes = set(self._messenger.node_ids())
        self._describe(self._to_ask(nodes), present=len(self._members(nodes)))
        return sorted(self._members(nodes), key=lambda member: member.site)

    def ask_again(self, member: Member) -> None:
        """Let a member introduce itself anew before it is counted on again."""
        self._standing.pop(member.node_id, None)

    def _members(self, nodes: set[int]) -> list[Member]:
        standing = [self._standing[node] for node in nodes & self._standing.keys()]
        shut_out = self._run.shut_out()
        return [one for one in standing if isinstance(one, Member) and one.site not in shut_out]

    def _awaiting(self, nodes: set[int]) -> list[str]:
        standing = [self._standing[node] for node in nodes & self._standing.keys()]
        return sorted(one.site for one in standing if isinstance(one, _Awaiting))

    def _to_ask(self, nodes: set[int]) -> list[int]:
        now_s = time.monotonic()
        due = {
            node
            for node, one in self._standing.items()
            if isinstance(one, _Awaiting) and one.due_s <= now_s
        }
        return sorted(nodes - (self._standing.keys() - due))

    def _check_hope(self) -> None:
        """Waiting is for sites that may still come."""
        refused = {
            one.site: one.reason for one in self._standing.values() if isinstance(one, _Refused)
        }
        refused |= self._run.shut_out()
        began = self._run.roster.began
        needed = self._run.config.federation.min_sites
        if refused and len(began.keys() - refused.keys()) < needed:
            reasons = ", ".join(f"{site}: {reason}" for site, reason in sorted(refused.items()))
            raise QuorumError(
                f"{len(refused)} of the {len(began)} sites on the roster refused this run "
                f"({reasons}), and it needs {needed}; settle it with them and continue with --resume, "
                "or lower federation.min-sites"
            )

    def _describe(self, nodes: list[int], *, present: int) -> None:
        """Ask nodes who they are; keep those that prove to be a site of the roster."""
        if not nodes:
            return
        deadline_s = min(self._run.config.federation.join_timeout_s, _DESCRIBE_DEADLINE_S)
        task = self._task(deadline_s)
        if not self._asked.issuperset(nodes):
            # Whoever awaits approval is asked every few seconds: a line for each would bury the rest.
            self._run.audit.task_sent(task)
            self._asked.update(nodes)
        seen = self._run.audit.seen()
        enough = self._run.config.federation.min_sites
        grace_ends = time.monotonic() + _GRACE_S if present >= enough else math.inf
        sealed = seal_task(task, self._run.key)
        self._messenger.send(dict.fromkeys(nodes, (task, sealed)), ttl_s=deadline_s + _TTL_MARGIN_S)
        answers = self._messenger.answers(deadline_s=deadline_s, stop_at=lambda: grace_ends)
        for answer in answers:
            if answer.message is None:
                # It was gone, and will be asked the next time.
                self._messenger.forget(answer.sent.node_id)
                continue
            standing = self._hear(answer.sent.node_id, answer.message, task, seen)
            present += isinstance(standing, Member)
            # Nor must who awaits approval wait for a silent node before it is asked again.
            if present >= enough or isinstance(standing, _Awaiting):
                grace_ends = min(grace_ends, time.monotonic() + _GRACE_S)
        members = [one for one in self._standing.values() if isinstance(one, Member)]
        sites = sorted(member.site for member in members)
        if sites != self._sites:
            self._sites = sites
            # As text: not every reader of JSON holds 64 bits.
            by_site = {member.site: str(member.node_id) for member in members}
            self._run.history.record("sites", sites=sites, nodes=by_site)

    def _task(self, deadline_s: float) -> Task:
        return Task(
            kind="describe",
            run_uid=self._run.uid,
            site="",
            server_round=0,
            attempt=1,
            expires_at=int(time.time() + deadline_s) + 1,
            base_digest=self._run.base_digest,
            config=self._run.config.for_sites(),
            audit_head=self._run.audit.head(),
        )

    def _hear(
        self, node: int, message: Message, task: Task, seen: Mapping[str, SiteHeads]
    ) -> _Standing | None:
        """Take in what a node answered and return how it stands; None leaves it to be asked again."""
        roster = self._run.roster.current()
        try:
            envelope = answer_in(message, who=f"node {node}")
            site = unverified_reply_site(envelope)
            reply = verified_reply(envelope, task=task, site=site, roster=roster)
        except (ScreeningError, ProtocolError) as error:
            reason = error.reason if isinstance(error, ScreeningError) else error.code
            if self._is_news(f"node {node}", reason):
                logger.warning("node %d is not a site of this run: %s", node, error)
                self._run.audit.note(
                    "refused", run=self._run.uid, round=0, node=node, reason=reason
                )
            return None
        standing, refusal = self._judge(node, reply, declared_size=roster[site].declared_size)
        if refusal is None or self._is_news(site, refusal.reason):
            self._run.audit.replied(
                reply, task=task, size_bytes=envelope.size_bytes, seen=seen.get(site)
            )
            if refusal is not None:
                self._turn_down(site, refusal)
        if standing is not None:
            # What this site said on an earlier node no longer counts.
            others = {n: one for n, one in self._standing.items() if one.site != site}
            self._standing = {**others, node: standing}
        return standing

    def _judge(
        self, node: int, reply: Reply, *, declared_size: int
    ) -> tuple[_Standing | None, ScreeningError | None]:
        """How a site's answer makes it stand, and why it is no member, if it is none."""
        try:
            screen_reply(reply)
            return self._member(node, reply, declared_size=declared_size), None
        except ScreeningError as error:
            if error.reason == AWAITS_APPROVAL:
                return _Awaiting(reply.site, time.monotonic() + _ASK_AGAIN_S), error
            final = error.reason in FINAL_REFUSALS
            return (_Refused(reply.site, error.reason) if final else None), error

    def _member(self, node: int, reply: Reply, *, declared_size: int) -> Member:
        site = reply.site
        if reply.numbers.get("declared-size") != declared_size:
            raise ScreeningError(
                "declared-size",
                f"{site} declares another size than the {declared_size} it was enrolled with; enrol it "
                "again",
            )
        rank = int(reply.numbers.get("max-rank", 0))
        if rank < 1:
            raise ScreeningError("max-rank", f"{site} says it can hold rank {rank}")
        own = min(rank, self._run.config.lora.rank)
        return Member(site, node, declared_size, rank=own, max_rank=rank)

    def _turn_down(self, site: str, error: ScreeningError) -> None:
        """Say once why a site is no member."""
        if error.reason == AWAITS_APPROVAL:
            self._run.history.record("approval", site=site)
            self._run.audit.note("approval", run=self._run.uid, site=site)
            logger.warning("%s awaits its hospital's approval of this run", site)
            return
        self._run.history.record("refused", round=0, site=site, reason=error.reason)
        self._run.audit.note("refused", run=self._run.uid, round=0, site=site, reason=error.reason)
        logger.warning("%s", error)

    def _is_news(self, who: str, reason: str) -> bool:
        """Whether this was not said of them before in this run."""
        news = (who, reason) not in self._said
        self._said.add((who, reason))
        return news
