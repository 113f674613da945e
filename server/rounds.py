"""The round loop's part that talks to sites: who is asked, what comes back.

One bad site never ends a round: what it does wrong is refused, named in the history, and costs it its
place in the round. What comes after the deadline is named and dropped: each reply is bound to its task,
so none can count in another round.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.serverapp import Grid

from common.adapter import AdapterShape, AdapterState, lora_scaling
from common.errors import QuorumError, ScreeningError
from common.records import Envelope, Task, seal_task
from common.seeding import derive_seed
from server.aggregation.types import leading_ranks
from server.gathering import Gathering, Member
from server.messenger import Answer, Messenger, Sent
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

# A site's process died, or Flower lost the message: the site goes on from its ledger, so it is asked again
# in the same attempt.
_ASK_AGAIN_AT_ONCE = frozenset({"unanswered"})
# Before an attempt is made again: what was refused within a second would be so again.
_PAUSE_S, _MAX_PAUSE_S = 5.0, 60.0


@dataclass(frozen=True, slots=True)
class RoundReplies:
    """What a round brought in.

    updates: accepted, by site name. sent: what each of those sites was sent. refused: site -> reason.
    seconds: from the first task sent to the last reply taken. bytes_down, bytes_up: both ways.
    """

    updates: tuple[AcceptedUpdate, ...]
    sent: Mapping[str, AdapterState]
    refused: Mapping[str, str]
    attempts: int
    seconds: float
    bytes_down: int
    bytes_up: int


class Federation:
    """The sites of one run, as the coordinator sees them."""

    def __init__(self, grid: Grid, run: RunContext, *, shape: AdapterShape) -> None:
        self._messenger = Messenger(grid, on_late=self._note_late)
        self._gathering = Gathering(self._messenger, run)
        self._run = run
        self._shape = shape
        self._excluded: list[str] = []
        # Site and round of what was taken: the same reply again is not late.
        self._taken: set[tuple[str, int]] = set()

    def gather(self) -> list[Member]:
        """Return the sites that are there, once there are enough; see `Gathering.gather`."""
        return self._gathering.gather()

    def select(self, members: list[Member], *, server_round: int) -> list[Member]:
        """Return the sites of a round: all of them, or federation.fraction drawn by seed."""
        settings = self._run.config.federation
        count = max(settings.min_sites, math.ceil(settings.fraction * len(members)))
        if count >= len(members):
            return members
        draw = random.Random(derive_seed(self._run.config.train.seed, "selection", server_round))
        return sorted(draw.sample(members, count), key=lambda member: member.site)

    def run_round(self, current: AdapterState, *, server_round: int) -> RoundReplies:
        """Return the updates of one round, at least a quorum of them.

        Below quorum nothing is merged: the sites that gave no usable reply are asked again, at most
        federation.max-retries times, the very same task. Raises QuorumError after that.
        """
        config, history = self._run.config, self._run.history
        going = _Round(self._messenger, self._run, current, self._shape, server_round)
        attempt = 0
        while True:
            attempt += 1
            self._note_excluded()
            members = self.select(self.gather(), server_round=server_round)
            chosen = [member for member in members if going.may_ask(member.site)]
            sites = [member.site for member in chosen]
            history.record("round-started", round=server_round, attempt=attempt, sites=sites)
            attempt_started = time.monotonic()
            for member in going.ask(chosen):
                self._gathering.ask_again(member)
            if len(going.updates) >= config.quorum:
                self._taken = {(site, server_round) for site in going.updates}
                return going.replies(attempts=attempt)
            if attempt > config.federation.max_retries or not any(map(going.may_ask, sites)):
                reasons = ", ".join(f"{site}: {why}" for site, why in sorted(going.refused.items()))
                raise QuorumError(
                    f"round {server_round} has {len(going.updates)} usable replies of the "
                    f"{config.quorum} it needs after {attempt} attempts ({reasons}); nothing was "
                    "merged. Mend those sites and continue with --resume"
                )
            history.record(
                "retry",
                round=server_round,
                attempt=attempt,
                replies=len(going.updates),
                refused=going.refused,
            )
            missing = {going.refused.get(site) for site in sites} - {None, AWAITS_APPROVAL}
            pause_s = min(_PAUSE_S * 2 ** (attempt - 1), _MAX_PAUSE_S) if missing else 0.0
            time.sleep(max(0.0, attempt_started + pause_s - time.monotonic()))

    def _note_late(self, sent: Sent) -> None:
        task = sent.task
        if task.kind != "train" or (task.site, task.server_round) in self._taken:
            return
        logger.warning("round %d: %s answered too late", task.server_round, task.site)
        place = {"round": task.server_round, "site": task.site, "attempt": task.attempt}
        self._run.history.record("late", **place)
        self._run.audit.note("late", run=self._run.uid, **place)

    def _note_excluded(self) -> None:
        excluded = sorted(self._run.exclusions.current())
        if excluded != self._excluded:
            self._excluded = excluded
            self._run.history.record("excluded", sites=excluded)
            self._run.audit.note("excluded", run=self._run.uid, sites=excluded)


class _Round:
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
        self._current = current
        self._shape = shape
        self._round = server_round
        self._started = time.monotonic()
        self._bytes_down = self._bytes_up = 0
        # By rank: what is sent to those who hold it.
        self._cuts: dict[int, tuple[AdapterState, bytes, str]] = {}
        self._members: dict[str, Member] = {}
        self._times_asked: Counter[str] = Counter()
        # Whose answer this attempt still waits for.
        self._waiting: set[str] = set()
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
        for answer in self._messenger.answers(deadline_s=deadline_s, stop_at=self._drop_excluded):
            site = answer.sent.task.site
            if site in self.updates or site not in self._waiting:
                continue
            reason = self._take(answer)
            if reason == AWAITS_APPROVAL:
                awaiting.append(self._members[site])
        for site in sorted(self._waiting):
            self._refuse(site, "silent")
        self._drop_excluded()
        return awaiting

    def replies(self, *, attempts: int) -> RoundReplies:
        """Return what the round brought in."""
        return RoundReplies(
            tuple(update for _, update in sorted(self.updates.items())),
            {site: self._cut(self._members[site].rank)[0] for site in self.updates},
            self.refused,
            attempts,
            time.monotonic() - self._started,
            self._bytes_down,
            self._bytes_up,
        )

    def _send(self, members: list[Member]) -> None:
        seen = self._run.audit.seen()
        tasks = {}
        for member in members:
            self._times_asked[member.site] += 1
            _, data, digest = self._cut(member.rank)
            expires_s = max(0.0, self._attempt_ends_s - time.monotonic()) + time.time()
            task = Task(
                kind="train",
                run_uid=self._run.uid,
                site=member.site,
                server_round=self._round,
                attempt=self._times_asked[member.site],
                expires_at=int(expires_s) + 1,
                base_digest=self._run.base_digest,
                adapter_digest=digest,
                config={**self._run.config.for_sites(), "lora.rank": member.rank},
                seen=seen.get(member.site),
                audit_head=self._run.audit.head(),
            )
            # Before it leaves: a task that nobody wrote down would be one that nobody sent.
            self._run.audit.task_sent(task, declared_size=member.declared_size)
            tasks[member.node_id] = (task, seal_task(task, self._run.key, adapter=data))
            self._waiting.add(member.site)
        self._bytes_down += sum(envelope.size_bytes for _, envelope in tasks.values())
        # Longer than anybody waits, so that what is late can be named.
        self._messenger.send(tasks, ttl_s=2 * self._run.config.federation.deadline_s + 60)

    def _take(self, answer: Answer) -> str:
        """Take in one answer and return why it was refused, "" when it was not."""
        task = answer.sent.task
        site, reason = task.site, "lost"
        try:
            if answer.message is None:
                # Its node was gone and came back, and with it went what it had been sent.
                raise ScreeningError("lost", f"{site} was gone and may have forgotten its task")
            envelope = answer_in(answer.message, who=site)
            self._bytes_up += envelope.size_bytes
            update = self._screened(envelope, task)
        except ScreeningError as error:
            reason = error.reason
            logger.warning("round %d: %s", self._round, error)
            if reason != "lost":
                self._waiting.discard(site)
                self._refuse(site, reason, attempt=task.attempt)
            retries = self._run.config.federation.max_retries
            if reason in ("lost", *_ASK_AGAIN_AT_ONCE) and self._times_asked[site] <= retries:
                self._run.history.record("asked-again", round=self._round, site=site, reason=reason)
                self._send([self._members[site]])
            return reason
        self._waiting.discard(site)
        self.updates[site] = update
        self.refused.pop(site, None)
        self._run.history.record(
            "reply", round=self._round, site=site, numbers=dict(update.numbers)
        )
        return ""

    def _screened(self, envelope: Envelope, task: Task) -> AcceptedUpdate:
        reply = verified_reply(envelope, task=task, site=task.site, roster=self._run.roster)
        self._run.audit.replied(reply, task=task, size_bytes=envelope.size_bytes, seen=task.seen)
        rank = self._members[task.site].rank
        shape = self._shape.at_rank(rank, scaling=self._cut(rank)[0].scaling)
        return screen_update(reply, envelope.adapter, task=task, shape=shape)

    def _drop_excluded(self) -> float:
        """Neither wait for nor count a site that was shut out meanwhile; never ends the waiting itself."""
        excluded = self._run.exclusions.current()
        for site in sorted(excluded.keys() & (self._waiting | self.updates.keys())):
            self._waiting.discard(site)
            self.updates.pop(site, None)
            self._messenger.forget(self._members[site].node_id)
            self._refuse(site, "excluded")
        return math.inf

    def _refuse(self, site: str, reason: str, *, attempt: int = 0) -> None:
        self.refused[site] = reason
        place = {"round": self._round, "site": site, "reason": reason}
        self._run.history.record("refused", **place)
        attempt = attempt or self._times_asked[site]
        self._run.audit.note("refused", run=self._run.uid, attempt=attempt, **place)

    def _cut(self, rank: int) -> tuple[AdapterState, bytes, str]:
        """The current adapter at a rank: as a state, as bytes, and its digest."""
        if rank not in self._cuts:
            lora = self._run.config.lora
            scaling = lora_scaling(alpha=lora.alpha, rank=rank, use_rslora=lora.use_rslora)
            cut = leading_ranks(self._current, rank=rank, scaling=scaling)
            self._cuts[rank] = (cut, cut.to_safetensors(), cut.digest())
        return self._cuts[rank]
