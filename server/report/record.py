"""A run as a report sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from common.config import Scalar
from server.report.results import Attack, Evaluation
from server.run_state import RunState

Presence = Literal["took part", "refused", "late", "absent"]


@dataclass(frozen=True, slots=True)
class Scores:
    """loss: nats per answer token. token_accuracy: 0 to 1. None: not known."""

    loss: float | None = None
    perplexity: float | None = None
    token_accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One merged round. scores: central, None where it was not evaluated.

    seconds: by phase (train, wait, merge, evaluate). epsilon: site -> spent until then, null without
    protection. train_loss, train_seconds: of the sites that release them. memory_bytes: of the coordinator.
    """

    number: int
    scores: Scores | None
    presence: Mapping[str, Presence]
    reasons: Mapping[str, str]
    attempts: int
    discarded_energy: float | None
    bytes_up: int
    bytes_down: int
    seconds: Mapping[str, float]
    learning_rate: float | None
    memory_bytes: int | None
    epsilon: Mapping[str, float | None]
    train_loss: Mapping[str, float]
    train_seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SitePrivacy:
    """What a site has spent in this run. epsilon: None without protection.

    cap: what it may spend: of the site's own policy where that is known here (a simulation), else the
    run's target; None where there is neither. own_cap: whether it is the site's.
    """

    site: str
    unit: str
    epsilon: float | None
    delta: float | None
    noise_multiplier: float | None
    sample_rate: float | None
    steps: int | None
    cap: float | None
    own_cap: bool


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as its folder tells it. sites: all that were ever seen in it. wall_s: until now or its end."""

    name: str
    uid: str
    state: RunState
    settings: Mapping[str, Scalar]
    rounds_planned: int
    sites: tuple[str, ...]
    base: Scores | None
    final: Scores | None
    exported_round: int | None
    stopped_early: bool
    rounds: tuple[RoundRecord, ...]
    privacy: tuple[SitePrivacy, ...]
    wall_s: float
    simulated: bool
    evaluation: Evaluation | None
    attack: Attack | None

    @property
    def method(self) -> str:
        """How updates were merged."""
        return str(self.settings.get("aggregation.method", "?"))

    @property
    def bytes_up(self) -> int:
        """From all sites, in all rounds."""
        return sum(one.bytes_up for one in self.rounds)

    @property
    def bytes_down(self) -> int:
        """To all sites, in all rounds."""
        return sum(one.bytes_down for one in self.rounds)

    @property
    def last_round(self) -> int:
        """The newest merged round's number, 1 where there is none yet."""
        return self.rounds[-1].number if self.rounds else 1

    @property
    def evaluated(self) -> tuple[tuple[int, Scores], ...]:
        """The rounds that were evaluated centrally."""
        return tuple((one.number, one.scores) for one in self.rounds if one.scores is not None)

    @property
    def max_epsilon(self) -> float | None:
        """The largest of the sites', None when one of them, or all, have no protection."""
        spent = [one.epsilon for one in self.privacy]
        known = [one for one in spent if one is not None]
        return max(known) if known and len(known) == len(spent) else None
