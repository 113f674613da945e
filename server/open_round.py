"""One round while it goes: its tasks are signed and sent, its answers screened.

A site whose process or node died goes on from its ledger, so it is asked again in the same attempt.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from common.adapter import AdapterShape, AdapterState
from common.errors import ScreeningError
from common.records import Envelope, Task, seal_task
from server.aggregation import METHODS
from server.gathering import Member
from server.incoming import drop_update, keep_update
from server.messenger import Answer, Messenger
from server.portions import Portions
from server.roster import RosterEntry
from server.run_context import RunContext
from server.screening import (
    AWAITS_APPROVAL,
    FINAL_REFUSALS,
    AcceptedUpdate,
    answer_in,
    screen_update,
    verified_reply,
)

logger = logging.getLogger(__name__)

# Its process died, or Flower lost the message. If its node is gone, it is asked when that is back.
_ASK_AGAIN = frozenset({"unanswered"})
# A task's expires_at is in whole seconds.
_EXPIRY_ROUNDING_S = 1.0


@dataclass(frozen=True, slots=True)
class RoundReplies:
    """What a round brought in.

    updates: accepted, by site name. refused: site -> reason.
    seconds: from the first task sent to the last reply taken. bytes_down, bytes_up: both ways.
    """

    updates: tuple[AcceptedUpdate, ...]
    refused: Mapping[str, str]
    attempts: int
    seconds: float
    bytes_down: int
    bytes_up: int


class OpenRound:
    """One round while it goes: what each site was sent, and what came of it.

    updates: accepted so far, by site. refused: the last reason of every other site that was asked.
    """

    def __init__(
        self,
        messenger: Messenger,
        run: RunContext,
        current: AdapterState,
        shape: AdapterShape,
        server_round: int,
    ) -> None:
        self.updates: dict[str, AcceptedUpdate] = {}
        self.refused: dict[str, str] = {}
        self._messenger = messenger
        self._run = run
        self._round = server_round
        self._method = METHODS[run.config.aggregation.method]
        self._portions = Portions(
            current, shape=shape, lora=run.config.lora, sends_all=self._method.sends_all
        )
        self._started = time.monotonic()
        self._bytes_down = self._bytes_up = 0
        self._members: dict[str, Member] = {}
        self._times_asked: Counter[str] = Counter()
        # Whose answer this attempt still waits for.
        self._waiting: set[str] = set()
        # As each was enrolled when it was sent its task.
        self._enrolled: dict[str, RosterEntry | None] = {}
        self._attempt_ends_s = 0.0

    def may_ask(self, site: str) -> bool:
        """Whether asking a site (again) could bring something."""
        return site not in self.updates and self.refused.get(site) not in FINAL_REFUSALS

    def ask(self, members: list[Member]) -> list[Member]:
        """Ask sites and take in what they answer, until all have or federation.deadline-s has passed.

        Returns those that turned out to await their hospital's approval.
        """
        deadline_s = self._run.config.federation.deadline_s
        self._attempt_ends_s = time.monotonic() + deadline_s
        self._members.update({member.site: member for member in members})
        self._waiting = set()
        self._send(members)
        awaiting = []
        for answer in self._messenger.answers(deadline_s=deadline_s, stop_at=self._drop_shut_out):
            site = answer.sent.task.site
            if site not in self.updates and site in self._waiting:
                reason = self._take(answer)
                if reason == AWAITS_APPROVAL:
                    awaiting.append(self._members[site])
            # Else a whole adapter would be held while the next one is waited for.
            del answer
        for site in sorted(self._waiting):
            self._refuse(site, "silent")
        self._drop_shut_out()
        return awaiting

    def replies(self, *, attempts: int) -> RoundReplies:
        """Return what the round brought in."""
        return RoundReplies(
            tuple(update for _, update in sorted(self.updates.items())),
            self.refused,
            attempts,
            time.monotonic() - self._started,
            self._bytes_down,
            self._bytes_up,
        )

    def _send(self, members: list[Member]) -> None:
        seen, roster = self._run.audit.seen(), self._run.roster.current()
        tasks = {}
        for member in members:
            self._times_asked[member.site] += 1
            portion = self._portions.of(member)
            expires_s = max(0.0, self._attempt_ends_s - time.monotonic()) + time.time()
            task = Task(
                kind="train",
                run_uid=self._run.uid,
                site=member.site,
                server_round=self._round,
                attempt=self._times_asked[member.site],
                expires_at=int(expires_s) + 1,
                base_digest=self._run.base_digest,
                adapter_digest=portion.digest,
                config={
                    **self._run.config.for_sites(),
                    **portion.settings(),
                    "round.trained-factors": self._method.trained(self._round),
                },
                seen=seen.get(member.site),
                audit_head=self._run.audit.head(),
            )
            # Before it leaves: a task that nobody wrote down would be one that nobody sent.
            self._run.audit.task_sent(task, declared_size=member.declared_size)
            tasks[member.node_id] = (task, seal_task(task, self._run.key, adapter=portion.data))
            self._waiting.add(member.site)
            self._enrolled[member.site] = roster.get(member.site)
        self._bytes_down += sum(envelope.size_bytes for _, envelope in tasks.values())
        # Longer than anybody waits, so that what is late can be named.
        self._messenger.send(tasks, ttl_s=2 * self._run.config.federation.deadline_s + 60)

    def _take(self, answer: Answer) -> str:
        """Take in one answer and return why it was refused, "" when it was not."""
        task = answer.sent.task
        site, reason = task.site, "lost"
        try:
            if answer.unreadable:
                raise ScreeningError("unreadable", f"{site} sent what is no message")
            if answer.message is None:
                # Its node was gone and came back, and with it went what it had been sent.
                raise ScreeningError("lost", f"{site} was gone and may have forgotten its task")
            # As it came: judging those that came with it takes seconds each.
            if answer.arrived_s > self._attempt_ends_s + _EXPIRY_ROUNDING_S:
                raise ScreeningError("expired", f"{site}'s answer came after its task had expired")
            envelope = answer_in(answer.message, who=site)
            self._bytes_up += envelope.size_bytes
            update = self._screened(envelope, task)
        except ScreeningError as error:
            reason = error.reason
            logger.warning("round %d: %s", self._round, error)
            retries = self._run.config.federation.max_retries
            may_ask = self._times_asked[site] <= retries
            if reason in _ASK_AGAIN and may_ask and self._messenger.await_return(answer.sent):
                return reason
            if reason != "lost":
                self._waiting.discard(site)
                self._refuse(site, reason, attempt=task.attempt)
            if reason in ("lost", *_ASK_AGAIN) and may_ask:
                self._run.history.record("asked-again", round=self._round, site=site, reason=reason)
                self._send([self._members[site]])
            return reason
        self._waiting.discard(site)
        self.updates[site] = update
        self.refused.pop(site, None)
        self._run.history.record(
            "reply",
            round=self._round,
            site=site,
            numbers=dict(update.numbers),
            update_norm=float(f"{update.norm:.6g}"),
        )
        return ""

    def _screened(self, envelope: Envelope, task: Task) -> AcceptedUpdate:
        roster = self._run.roster.current()
        reply = verified_reply(envelope, task=task, site=task.site, roster=roster)
        self._run.audit.replied(reply, task=task, size_bytes=envelope.size_bytes, seen=task.seen)
        member = self._members[task.site]
        shape = self._portions.shape_for(member)
        update = screen_update(
            reply,
            envelope.adapter,
            task=task,
            shape=shape,
            sent=self._portions.of(member).state,
            max_norm=self._run.config.aggregation.max_update_norm,
            by_factors=self._method.averages_factors,
        )
        return keep_update(update, folder=self._run.incoming, task_sha256=task.sha256, shape=shape)

    def _drop_shut_out(self) -> float:
        """Neither wait for nor count a site that was shut out meanwhile; say when to stop waiting.

        Nor one that has new keys: what it was sent went to a node that is no more, and what it has answered
        may be the reason for them.
        """
        roster = self._run.roster.current()
        rotated = {
            site: "rotated"
            for site in self._waiting | self.updates.keys()
            if _keys(roster.get(site)) != _keys(self._enrolled[site])
        }
        dropped = rotated | self._run.shut_out()
        for site in sorted(dropped.keys() & (self._waiting | self.updates.keys())):
            self._waiting.discard(site)
            if site in self.updates:
                drop_update(self.updates.pop(site))
            self._messenger.forget(self._members[site].node_id)
            self._refuse(site, dropped[site])
        # Once nobody is missing, nothing is to come: what was sent twice may still be under way.
        return math.inf if self._waiting else -math.inf

    def _refuse(self, site: str, reason: str, *, attempt: int = 0) -> None:
        self.refused[site] = reason
        place = {"round": self._round, "site": site, "reason": reason}
        self._run.history.record("refused", **place)
        attempt = attempt or self._times_asked[site]
        self._run.audit.note("refused", run=self._run.uid, attempt=attempt, **place)


def _keys(entry: RosterEntry | None) -> tuple[str, str] | None:
    return None if entry is None else (entry.public_key, entry.node_key)
