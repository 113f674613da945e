"""The global adapter of a run: what it begins as, and what a round's replies make of it."""

from __future__ import annotations

from common.adapter import AdapterState
from common.config import RunConfig
from common.lora import initial_adapter
from common.model import BaseModel
from server.aggregation import METHODS, Merged, MergeRules, SiteUpdate, merge
from server.aggregation.frozen import orthonormal_start
from server.open_round import RoundReplies
from server.roster import Roster


def first_adapter(base: BaseModel, config: RunConfig) -> AdapterState:
    """Return the adapter that the first round starts from; as a product it is zero."""
    state = initial_adapter(base, config.lora, seed=config.train.seed)
    return orthonormal_start(state) if METHODS[config.aggregation.method].orthonormal else state


def merge_replies(
    replies: RoundReplies,
    current: AdapterState,
    velocity: AdapterState | None,
    *,
    config: RunConfig,
    roster: Roster,
) -> Merged:
    """Return the next global adapter, as the run's settings merge a round's replies.

    velocity: of the server's momentum, from the merge before. roster: its declared sizes are the weights.
    """
    section = config.aggregation
    by_size = section.weighting == "declared-size"
    updates = [
        SiteUpdate(
            update.site,
            float(roster[update.site].declared_size) if by_size else 1.0,
            returned=update.adapter,
        )
        for update in replies.updates
    ]
    rules = MergeRules(
        method=section.method,
        robust=section.robust,
        clip_norm=section.clip_norm,
        momentum=section.server_momentum,
        rank=config.lora.rank,
    )
    return merge(current, updates, rules=rules, velocity=velocity)
