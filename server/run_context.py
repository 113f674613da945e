"""What belongs to one run at the coordinator, and goes wherever its tasks are made or judged."""

from __future__ import annotations

from dataclasses import dataclass

from common.config import RunConfig
from common.signing import SigningKey
from server.audit import CoordinatorAudit
from server.exclusions import Exclusions
from server.history import History
from server.roster import Roster


@dataclass(frozen=True, slots=True)
class RunContext:
    """One run. uid: the same after a resume. key: signs its tasks. base_digest: of its base model.

    history, audit: where what happens is written, for people and as evidence. exclusions: the sites that
    the coordinator has shut out of this run, read anew whenever they matter.
    """

    uid: str
    config: RunConfig
    key: SigningKey
    roster: Roster
    base_digest: str
    history: History
    audit: CoordinatorAudit
    exclusions: Exclusions
