"""The round loop's part that talks to sites: who is asked, what comes back.

One bad site never ends a round: what it does wrong is refused, named in the history, and costs it its
place in the round.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass

from common.adapter import AdapterShape, AdapterState, lora_scaling
from common.errors import QuorumError, ScreeningError
from common.records import Envelope, SiteHeads, Task, seal_task
from common.seeding import derive_seed
from server.aggregation.types import leading_ranks
from server.gathering import Gathering, Member
from server.messenger import Messenger
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

    def __init__(self, messenger: Messenger, run: RunContext, *, shape: AdapterShape) -> None:
        self._gathering = Gathering(messenger, run)
        self._messenger = messenger
        self._run = run
        self._shape = shape

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
        config, started = self._run.config, time.monotonic()
        updates: dict[str, AcceptedUpdate] = {}
        sent: dict[str, AdapterState] = {}
        refused: dict[str, str] = {}
        bytes_down = bytes_up = 0
        attempt = 0
        while True:
            attempt += 1
            members = self.gather()
            chosen = [
                member
                for member in self.select(members, server_round=server_round)
                if member.site not in updates and refused.get(member.site) not in FINAL_REFUSALS
            ]
            self._run.history.record(
                "round-started",
                round=server_round,
                attempt=attempt,
                sites=[member.site for member in chosen],
            )
            down, up = self._attempt(
                current, chosen, server_round, attempt, updates=updates, sent=sent, refused=refused
            )
            bytes_down, bytes_up = bytes_down + down, bytes_up + up
            if len(updates) >= config.quorum:
                return RoundReplies(
                    tuple(update for _, update in sorted(updates.items())),
                    {site: sent[site] for site in updates},
                    refused,
                    attempt,
                    time.monotonic() - started,
                    bytes_down,
                    bytes_up,
                )
            hopeless = all(
                member.site in updates or refused.get(member.site) in FINAL_REFUSALS
                for member in chosen
            )
            if attempt > config.federation.max_retries or hopeless:
                reasons = ", ".join(f"{site}: {why}" for site, why in sorted(refused.items()))
                raise QuorumError(
                    f"round {server_round} has {len(updates)} usable replies of the "
                    f"{config.quorum} it needs after {attempt} attempts ({reasons}); nothing was "
                    "merged. Mend those sites and continue with --resume"
                )
            self._run.history.record(
                "retry", round=server_round, attempt=attempt, replies=len(updates), refused=refused
            )

    def _attempt(
        self,
        current: AdapterState,
        chosen: list[Member],
        server_round: int,
        attempt: int,
        *,
        updates: dict[str, AcceptedUpdate],
        sent: dict[str, AdapterState],
        refused: dict[str, str],
    ) -> tuple[int, int]:
        deadline_s = self._run.config.federation.deadline_s
        by_node = {member.node_id: member for member in chosen}
        seen = self._run.audit.seen()
        tasks, shapes = {}, {}
        cuts: dict[int, tuple[AdapterState, bytes, str]] = {}
        for member in chosen:
            if member.rank not in cuts:
                cut = leading_ranks(current, rank=member.rank, scaling=self._scaling(member.rank))
                cuts[member.rank] = (cut, cut.to_safetensors(), cut.digest())
            state, data, digest = cuts[member.rank]
            task = self._task(member, digest, server_round, attempt, seen.get(member.site))
            # Before it leaves: a task that nobody wrote down would be one that nobody sent.
            self._run.audit.task_sent(task, declared_size=member.declared_size)
            tasks[member.node_id] = (task, seal_task(task, self._run.key, adapter=data))
            shapes[member.node_id] = self._shape.at_rank(member.rank, scaling=state.scaling)
            sent[member.site] = state
        bytes_down = sum(envelope.size_bytes for _, envelope in tasks.values())
        bytes_up = 0
        silent = dict(by_node)
        for node, message in self._messenger.exchange(tasks, deadline_s=deadline_s):
            member, task = by_node[node], tasks[node][0]
            del silent[node]
            try:
                envelope = answer_in(message, who=member.site)
                bytes_up += envelope.size_bytes
                update = self._screened(envelope, task, shape=shapes[node])
            except ScreeningError as error:
                logger.warning("round %d: %s", server_round, error)
                refused[member.site] = error.reason
                self._refuse(task, error.reason)
                if error.reason == AWAITS_APPROVAL:
                    self._gathering.ask_again(member)
                continue
            updates[member.site] = update
            refused.pop(member.site, None)
            self._run.history.record(
                "reply", round=server_round, site=member.site, numbers=dict(update.numbers)
            )
        for node, member in sorted(silent.items(), key=lambda item: item[1].site):
            refused[member.site] = "silent"
            self._refuse(tasks[node][0], "silent")
        return bytes_down, bytes_up

    def _screened(self, envelope: Envelope, task: Task, *, shape: AdapterShape) -> AcceptedUpdate:
        reply = verified_reply(envelope, task=task, site=task.site, roster=self._run.roster)
        self._run.audit.replied(reply, task=task, size_bytes=envelope.size_bytes, seen=task.seen)
        return screen_update(reply, envelope.adapter, task=task, shape=shape)

    def _refuse(self, task: Task, reason: str) -> None:
        place = {"round": task.server_round, "site": task.site, "reason": reason}
        self._run.history.record("refused", **place)
        self._run.audit.note("refused", run=self._run.uid, attempt=task.attempt, **place)

    def _task(
        self,
        member: Member,
        digest: str,
        server_round: int,
        attempt: int,
        seen: SiteHeads | None,
    ) -> Task:
        return Task(
            kind="train",
            run_uid=self._run.uid,
            site=member.site,
            server_round=server_round,
            attempt=attempt,
            expires_at=int(time.time() + self._run.config.federation.deadline_s) + 1,
            base_digest=self._run.base_digest,
            adapter_digest=digest,
            config={**self._run.config.for_sites(), "lora.rank": member.rank},
            seen=seen,
            audit_head=self._run.audit.head(),
        )

    def _scaling(self, rank: int) -> float:
        lora = self._run.config.lora
        return lora_scaling(alpha=lora.alpha, rank=rank, use_rslora=lora.use_rslora)
