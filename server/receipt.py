"""The receipt for a site that was restored from a backup: what the coordinator knows it has spent.

It names every task that the site may have trained, answered or not: a reply that never came may still
have left the hospital. Only a task that the site itself, signed, says it did not do is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from common.audit_log import AuditEntry
from common.errors import ConfigError, PrivacyError
from common.privacy import calibrate_noise
from common.receipts import Receipt, ReceiptCharge
from common.records import SiteHeads

# What a site says only before it charges a task; any other error may have come after.
_NOT_CHARGED = frozenset(
    {"approval", "restored", "protocol", "signature", "shape", "policy", "budget"}
)


@dataclass(slots=True)
class _SentTask:
    """One task over all its attempts. undone: attempts that the site says it did not do.

    privacy: as the site stated it when it was done.
    """

    run_uid: str
    server_round: int
    charge: Mapping[str, Any]
    attempts: set[str] = field(default_factory=set)
    undone: set[str] = field(default_factory=set)
    answered: bool = False
    privacy: Mapping[str, Any] | None = None


def make_receipt(
    entries: Iterable[AuditEntry], *, site: str, seen: Mapping[str, SiteHeads], issued_at: int
) -> Receipt:
    """Return the receipt of a site.

    entries: the coordinator's whole audit log. seen: where each site stood. issued_at: Unix seconds.
    Raises ConfigError when the site was never heard of.
    """
    if site not in seen:
        raise ConfigError(
            f"no site {site!r} has ever answered this coordinator; it heard from: "
            f"{', '.join(sorted(seen)) or 'none'}"
        )
    tasks: dict[str, _SentTask] = {}
    for entry in entries:
        fields = entry.fields
        if entry.event not in ("task", "reply") or fields["kind"] != "train":
            continue
        if fields["site"] != site:
            continue
        if entry.event == "task":
            new = _SentTask(fields["run"], fields["round"], fields["charge"])
            tasks.setdefault(fields["task_id"], new).attempts.add(fields["task"])
        elif fields["error"] in _NOT_CHARGED:
            tasks[fields["task_id"]].undone.add(fields["task"])
        elif not fields["error"]:
            tasks[fields["task_id"]].answered = True
            tasks[fields["task_id"]].privacy = fields["privacy"]
    charges = [_charge(task_id, task, tasks.values()) for task_id, task in tasks.items()]
    return Receipt(
        site=site,
        heads=seen[site],
        charges=tuple(charge for charge in charges if charge is not None),
        issued_at=issued_at,
    )


def _charge(task_id: str, task: _SentTask, known: Iterable[_SentTask]) -> ReceiptCharge | None:
    """The charge of one task; None when it cannot have been trained."""
    if not task.answered and task.attempts == task.undone:
        return None
    noise = _noise(task, known)
    if noise is None:
        return None
    stated = task.privacy or task.charge
    return ReceiptCharge(
        task_id=task_id,
        run_uid=task.run_uid,
        unit=stated["unit"],
        server_round=task.server_round,
        noise_multiplier=noise,
        sample_rate=stated["sample_rate"],
        steps=task.charge["steps"],
        answered=task.answered,
    )


def _noise(task: _SentTask, known: Iterable[_SentTask]) -> float | None:
    """The task's noise multiplier: as the site said, else as it was asked for, else calibrated.

    None when no noise reaches the target: then the site could not train.
    """
    if task.privacy is not None:
        return float(task.privacy["noise_multiplier"])
    charge = task.charge
    if charge["noise_multiplier"] != "auto":
        return float(charge["noise_multiplier"])
    for other in known:
        if other.run_uid == task.run_uid and other.privacy is not None:
            return float(other.privacy["noise_multiplier"])
    try:
        return calibrate_noise(
            target_epsilon=charge["target_epsilon"],
            delta=charge["target_delta"],
            sample_rate=charge["sample_rate"],
            steps=charge["planned_steps"],
            accountant=charge["accountant"],
        )
    except PrivacyError:
        return None
