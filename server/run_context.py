"""What belongs to one run at the coordinator, and goes wherever its tasks are made or judged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.config import RunConfig
from common.signing import SigningKey
from server.audit import CoordinatorAudit
from server.exclusions import Exclusions
from server.history import History
from server.roster import LiveRoster


@dataclass(frozen=True, slots=True)
class RunContext:
    """One run. uid: the same after a resume. key: signs its tasks. base_digest: of its base model.

    history, audit: where what happens is written, for people and as evidence. roster, exclusions: who is
    enrolled, and whom the coordinator has shut out of this run, read anew whenever they matter. incoming: the
    folder in which accepted updates lie until they are merged.
    """

    uid: str
    config: RunConfig
    key: SigningKey
    roster: LiveRoster
    base_digest: str
    history: History
    audit: CoordinatorAudit
    exclusions: Exclusions
    incoming: Path

    def shut_out(self) -> dict[str, str]:
        """Return who takes no part in this run any more, and why: "revoked" or "excluded"."""
        excluded = dict.fromkeys(self.exclusions.current(), "excluded")
        return excluded | dict.fromkeys(self.roster.gone(), "revoked")
