"""What an attack found, as attack.json holds it: numbers only, no word of any record."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from simulations.attack.guessing import Audit
from simulations.attack.membership import Interval, MembershipAttack
from simulations.attack.planted import PlantedResult
from simulations.attack.training import Ledger

SCOPE = "an audit of the training pipeline on a twin, not of this release's data"

Kind = Literal["simulated twin", "simulation"]


@dataclass(frozen=True, slots=True)
class AttackResult:
    """All attacks on one site's training. run: the run's uid or name. planted: None where not tried."""

    kind: Kind
    run: str
    site: str
    ledger: Ledger
    audits: tuple[Audit, ...]
    membership: tuple[MembershipAttack, ...]
    planted: PlantedResult | None
    seed: int

    def as_json(self) -> dict[str, Any]:
        """Return what attack.json holds."""
        return {
            "kind": self.kind,
            "run": self.run,
            "site": self.site,
            "ledger": asdict(self.ledger),
            "audits": [asdict(audit) for audit in self.audits],
            "membership": [_membership(attack) for attack in self.membership],
            "planted": None if self.planted is None else asdict(self.planted),
            "seed": self.seed,
            "scope": SCOPE,
        }


def _membership(attack: MembershipAttack) -> dict[str, Any]:
    return {
        "name": attack.name,
        "members": attack.members,
        "nonmembers": attack.nonmembers,
        "confidence": attack.confidence,
        "auc": _interval(attack.auc),
        "tpr_at_1pct_fpr": _interval(attack.tpr_at_1pct_fpr),
        "roc": [list(point) for point in attack.roc],
    }


def _interval(interval: Interval) -> list[float]:
    return [interval.value, interval.low, interval.high]
