"""The round loop's parts that talk to sites: who is there, who is asked, what comes back.

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

from flwr.app import Message

from common.adapter import AdapterShape, AdapterState, lora_scaling
from common.config import SENT_TO_SITES, RunConfig
from common.errors import ProtocolError, QuorumError, ScreeningError
from common.records import (
    Envelope,
    Task,
    envelope_of,
    seal_task,
    unverified_reply_site,
    with_attempt,
)
from common.seeding import derive_seed
from common.signing import SigningKey
from server.aggregation.types import leading_ranks
from server.history import History
from server.messenger import Messenger
from server.roster import Roster
from server.screening import AcceptedUpdate, screen_reply, screen_update

logger = logging.getLogger(__name__)

# A site that says one of these would say it again: it is not asked twice in a round.
_FINAL_REFUSALS = frozenset(
    f"site-{code}" for code in ("policy", "budget", "config", "privacy", "model", "data", "egress")
)
# Once enough sites are there, so long the others may still take to introduce themselves.
_GRACE_S = 15.0
_DESCRIBE_DEADLINE_S = 300.0


@dataclass(frozen=True, slots=True)
class Member:
    """A site that is there now: its node, public size and the rank that it can hold."""

    site: str
    node_id: int
    declared_size: int
    rank: int


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

    def __init__(
        self,
        messenger: Messenger,
        *,
        config: RunConfig,
        run_uid: str,
        key: SigningKey,
        roster: Roster,
        base_digest: str,
        shape: AdapterShape,
        history: History,
    ) -> None:
        self._messenger = messenger
        self._config = config
        self._run_uid = run_uid
        self._key = key
        self._roster = roster
        self._base_digest = base_digest
        self._shape = shape
        self._history = history
        self._members: dict[int, Member] = {}

    def gather(self) -> list[Member]:
        """Return the sites that are there, sorted by name, once there are min-sites of them.

        Raises QuorumError when too few come within federation.join-timeout-s.
        """
        settings = self._config.federation
        deadline = time.monotonic() + settings.join_timeout_s
        said = False
        while True:
            nodes = self._messenger.node_ids()
            present = {n: m for n, m in self._members.items() if n in nodes}
            self._describe([node for node in nodes if node not in present], len(present))
            present = {n: m for n, m in self._members.items() if n in nodes}
            if len(present) >= settings.min_sites:
                return sorted(present.values(), key=lambda member: member.site)
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise QuorumError(
                    f"{len(present)} of {settings.min_sites} sites came within "
                    f"{settings.join_timeout_s:.0f} s ({', '.join(sorted(self._names(present)))}); "
                    "start the missing ones, or lower federation.min-sites"
                )
            if not said:
                said = True
                self._history.record("waiting", present=len(present), needed=settings.min_sites)
            time.sleep(min(2.0, left_s))

    def select(self, members: list[Member], *, server_round: int) -> list[Member]:
        """Return the sites of a round: all of them, or federation.fraction drawn by seed."""
        settings = self._config.federation
        count = max(settings.min_sites, math.ceil(settings.fraction * len(members)))
        if count >= len(members):
            return members
        draw = random.Random(derive_seed(self._config.train.seed, "selection", server_round))
        return sorted(draw.sample(members, count), key=lambda member: member.site)

    def run_round(self, current: AdapterState, *, server_round: int) -> RoundReplies:
        """Return the updates of one round, at least a quorum of them.

        Below quorum nothing is merged: the sites that gave no usable reply are asked again, at most
        federation.max-retries times, the very same task. Raises QuorumError after that.
        """
        config, started = self._config, time.monotonic()
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
                if member.site not in updates and refused.get(member.site) not in _FINAL_REFUSALS
            ]
            self._history.record(
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
                member.site in updates or refused.get(member.site) in _FINAL_REFUSALS
                for member in chosen
            )
            if attempt > config.federation.max_retries or hopeless:
                reasons = ", ".join(f"{site}: {why}" for site, why in sorted(refused.items()))
                raise QuorumError(
                    f"round {server_round} has {len(updates)} usable replies of the "
                    f"{config.quorum} it needs after {attempt} attempts ({reasons}); nothing was "
                    "merged. Mend those sites and continue with --resume"
                )
            self._history.record(
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
        deadline_s = self._config.federation.deadline_s
        by_node = {member.node_id: member for member in chosen}
        tasks, shapes = {}, {}
        cuts: dict[int, tuple[AdapterState, bytes, str]] = {}
        for member in chosen:
            if member.rank not in cuts:
                cut = leading_ranks(current, rank=member.rank, scaling=self._scaling(member.rank))
                cuts[member.rank] = (cut, cut.to_safetensors(), cut.digest())
            state, data, digest = cuts[member.rank]
            task = self._task(member, digest, server_round, attempt, deadline_s)
            tasks[member.node_id] = (task, seal_task(task, self._key, adapter=data))
            shapes[member.node_id] = self._shape.at_rank(member.rank, scaling=state.scaling)
            sent[member.site] = state
        bytes_down = sum(envelope.size_bytes for _, envelope in tasks.values())
        bytes_up = 0
        silent = {member.site for member in chosen}
        for node, message in self._messenger.exchange(tasks, deadline_s=deadline_s):
            member = by_node[node]
            silent.discard(member.site)
            try:
                envelope = _envelope(message, member.site)
                bytes_up += envelope.size_bytes
                update = screen_update(
                    envelope,
                    task=tasks[node][0],
                    site=member.site,
                    roster=self._roster,
                    shape=shapes[node],
                )
            except ScreeningError as error:
                refused[member.site] = error.reason
                self._history.record(
                    "refused", round=server_round, site=member.site, reason=error.reason
                )
                logger.warning("round %d: %s", server_round, error)
                continue
            updates[member.site] = update
            refused.pop(member.site, None)
            self._history.record(
                "reply", round=server_round, site=member.site, numbers=dict(update.numbers)
            )
        for site in sorted(silent):
            refused[site] = "silent"
            self._history.record("refused", round=server_round, site=site, reason="silent")
        return bytes_down, bytes_up

    def _task(
        self, member: Member, digest: str, server_round: int, attempt: int, deadline_s: float
    ) -> Task:
        config = {
            key: value
            for key, value in self._config.flat().items()
            if key.startswith(SENT_TO_SITES)
        }
        config["lora.rank"] = member.rank
        task = Task(
            kind="train",
            run_uid=self._run_uid,
            site=member.site,
            server_round=server_round,
            attempt=1,
            expires_at=0,
            base_digest=self._base_digest,
            adapter_digest=digest,
            config=config,
        )
        return with_attempt(task, attempt=attempt, expires_at=int(time.time() + deadline_s) + 1)

    def _scaling(self, rank: int) -> float:
        lora = self._config.lora
        return lora_scaling(alpha=lora.alpha, rank=rank, use_rslora=lora.use_rslora)

    def _describe(self, nodes: list[int], present: int) -> None:
        """Ask nodes who they are; keep those that prove to be a site of the roster."""
        if not nodes:
            return
        deadline_s = min(self._config.federation.join_timeout_s, _DESCRIBE_DEADLINE_S)
        task = Task(
            kind="describe",
            run_uid=self._run_uid,
            site="",
            server_round=0,
            attempt=1,
            expires_at=int(time.time() + deadline_s) + 1,
        )
        envelope = seal_task(task, self._key)
        enough = self._config.federation.min_sites
        grace_ends = time.monotonic() + _GRACE_S if present >= enough else math.inf
        answers = self._messenger.exchange(
            dict.fromkeys(nodes, (task, envelope)),
            deadline_s=deadline_s,
            stop_at=lambda: grace_ends,
        )
        for node, message in answers:
            try:
                member = self._introduce(node, message, task)
            except (ScreeningError, ProtocolError) as error:
                logger.warning("node %d is not a site of this run: %s", node, error)
                continue
            self._members = {n: m for n, m in self._members.items() if m.site != member.site} | {
                node: member
            }
            present += 1
            if present >= enough and math.isinf(grace_ends):
                grace_ends = time.monotonic() + _GRACE_S
        self._history.record("sites", sites=sorted(self._names(self._members)))

    def _introduce(self, node: int, message: Message, task: Task) -> Member:
        envelope = envelope_of(message)
        site = unverified_reply_site(envelope)
        reply = screen_reply(envelope, task=task, site=site, roster=self._roster)
        declared = self._roster[site].declared_size
        if reply.numbers.get("declared-size") != declared:
            raise ScreeningError(
                "declared-size",
                f"{site} declares another size than the {declared} it was enrolled with; enrol it "
                "again",
            )
        rank = int(reply.numbers.get("max-rank", 0))
        if rank < 1:
            raise ScreeningError("max-rank", f"{site} says it can hold rank {rank}")
        return Member(site, node, declared, min(rank, self._config.lora.rank))

    @staticmethod
    def _names(members: Mapping[int, Member]) -> set[str]:
        return {member.site for member in members.values()}


def _envelope(message: Message, site: str) -> Envelope:
    try:
        return envelope_of(message)
    except ProtocolError as error:
        raise ScreeningError("unanswered", f"{site}: {error}") from None
