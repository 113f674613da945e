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

from flwr.serverapp import Grid

from common.adapter import AdapterShape, AdapterState
from common.errors import QuorumError
from common.seeding import derive_seed
from server.evaluation import AtSites
from server.gathering import Gathering, Member
from server.messenger import Messenger, Sent
from server.open_round import OpenRound, RoundReplies
from server.portions import Portions
from server.run_context import RunContext
from server.screening import (
    AWAITS_APPROVAL,
)
from server.site_evaluation import evaluate_at_sites

logger = logging.getLogger(__name__)

# Before an attempt is made again: what was refused within a second would be so again.
_PAUSE_S, _MAX_PAUSE_S = 5.0, 60.0


class Federation:
    """The sites of one run, as the coordinator sees them. pull_threads: see `Messenger`."""

    def __init__(
        self, grid: Grid, run: RunContext, *, shape: AdapterShape, pull_threads: int = 0
    ) -> None:
        self._messenger = Messenger(grid, on_late=self._note_late, pull_threads=pull_threads)
        self._gathering = Gathering(self._messenger, run)
        self._run = run
        self._shape = shape
        self._excluded: list[str] = []
        self._revoked: list[str] = []
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
        going = OpenRound(self._messenger, self._run, current, self._shape, server_round)
        attempt = 0
        while True:
            attempt += 1
            self._note_shut_out()
            present = self.gather()
            # Who refused for good leaves the place to another; who has answered keeps it.
            willing = [
                member
                for member in present
                if member.site in going.updates or going.may_ask(member.site)
            ]
            members = self.select(willing, server_round=server_round)
            askable = [member for member in willing if going.may_ask(member.site)]
            chosen = [member for member in members if member in askable] or askable
            sites = [member.site for member in chosen]
            history.record("round-started", round=server_round, attempt=attempt, sites=sites)
            attempt_started = time.monotonic()
            for member in going.ask(chosen):
                self._gathering.ask_again(member)
            if len(going.updates) >= config.quorum:
                self._taken = {(site, server_round) for site in going.updates}
                return going.replies(attempts=attempt)
            hope = any(going.may_ask(member.site) for member in present)
            if attempt > config.federation.max_retries or not hope:
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

    def evaluate_at_sites(self, adapter: AdapterState, *, server_round: int) -> AtSites:
        """Return what the sites that are there count for an adapter on test records of their own.

        server_round: that made it.
        """
        self._note_shut_out()
        lora = self._run.config.lora
        portions = Portions(adapter, shape=self._shape, lora=lora, sends_all=True)
        return evaluate_at_sites(
            self._messenger,
            self._run,
            self._gathering.present(),
            portions,
            server_round=server_round,
        )

    def _note_late(self, sent: Sent) -> None:
        task = sent.task
        if task.kind != "train" or (task.site, task.server_round) in self._taken:
            return
        logger.warning("round %d: %s answered too late", task.server_round, task.site)
        place = {"round": task.server_round, "site": task.site, "attempt": task.attempt}
        self._run.history.record("late", **place)
        self._run.audit.note("late", run=self._run.uid, **place)

    def _note_shut_out(self) -> None:
        excluded = sorted(self._run.exclusions.current())
        if excluded != self._excluded:
            self._excluded = excluded
            self._run.history.record("excluded", sites=excluded)
            self._run.audit.note("excluded", run=self._run.uid, sites=excluded)
        revoked = self._run.roster.gone()
        if revoked != self._revoked:
            # Whoever revoked it has told the audit log.
            self._revoked = revoked
            self._run.history.record("revoked", sites=revoked)
