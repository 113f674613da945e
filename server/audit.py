"""The coordinator's audit log: what was asked of which site, what came back, what was made of it.

It lies beside the coordinator's signing key and outlives runs, because it is also the memory of where
each site's ledger and audit log stood when they were last heard of. Lines, beside those that the log
itself makes: run-started, resumed, task, reply, refused, approval, behind, merged, stopped, finished,
receipt, revoked and rotated.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.audit_log import AuditEntry, AuditLog
from common.chain import ChainHead
from common.config import Scalar
from common.privacy import public_sample_rate
from common.records import Reply, SiteHeads, Task
from common.signing import SigningKey

AUDIT_FILE = "audit.jsonl"
KEY_FILE = "signing.pem"

# What these say is settled, and is worth a signature of its own.
_SIGNED_AT_ONCE = frozenset({"merged", "stopped", "finished", "revoked", "rotated"})

logger = logging.getLogger(__name__)


class CoordinatorAudit:
    """The log in a coordinator's folder.

    Raises AuditError from every method once the file is not the chain that it was.
    """

    def __init__(self, folder: Path, key: SigningKey) -> None:
        self.path = folder / AUDIT_FILE
        self._seen: dict[str, SiteHeads] = {}
        # By site, the heads of the last receipt that it was given.
        self._attested: dict[str, SiteHeads] = {}
        self._log = AuditLog(self.path, key, watch=self._take_in)

    def note(self, event: str, **fields: Any) -> None:
        """Write one event."""
        self._log.append(event, **fields)
        if event in _SIGNED_AT_ONCE:
            self._log.checkpoint()

    def head(self) -> ChainHead:
        """Return where this log stands.

        A task carries it as it was before the task's own line, which names the task's digest and so
        comes after it: what a site keeps of a task covers every line that led to it.
        """
        return self._log.head()

    def seen(self) -> dict[str, SiteHeads]:
        """Return, by site, the heads that its ledger and audit log must not be behind.

        Those of its last finished task, over all runs; of its first introduction before that. Only a
        finished task counts later, because a site does one only if it has been where it was last seen: a
        restored site's other replies must not pass for that.
        """
        self._log.head()
        return dict(self._seen)

    def task_sent(self, task: Task, *, declared_size: int = 0) -> None:
        """Write down a task that is about to be sent. declared_size: of the site, for a train task."""
        charge = _charge(task, declared_size=declared_size) if task.kind == "train" else None
        self.note(
            "task",
            run=task.run_uid,
            round=task.server_round,
            attempt=task.attempt,
            kind=task.kind,
            site=task.site,
            task_id=task.task_id,
            task=task.sha256,
            adapter=task.adapter_digest,
            charge=charge,
        )

    def replied(self, reply: Reply, *, task: Task, size_bytes: int, seen: SiteHeads | None) -> None:
        """Write down a verified reply, and that the site is behind `seen`, if it is.

        seen: the heads that the site had sent before it was given this task.
        """
        self.note(
            "reply",
            run=reply.run_uid,
            round=reply.server_round,
            attempt=reply.attempt,
            kind=task.kind,
            site=reply.site,
            task_id=task.task_id,
            task=reply.task_sha256,
            adapter=reply.adapter_digest,
            bytes=size_bytes,
            error=reply.error_code,
            correlation_id=reply.correlation_id,
            heads=None if reply.heads is None else asdict(reply.heads),
            privacy=None if reply.privacy is None else asdict(reply.privacy),
            numbers=reply.numbers,
        )
        if seen is None or reply.heads is None:
            return
        # A log that was settled goes on from its backup; a ledger gets back what it lost.
        settled = self._attested.get(reply.site) == seen
        if _is_behind(reply.heads.ledger, seen.ledger) or (
            _is_behind(reply.heads.audit, seen.audit) and not settled
        ):
            logger.warning(
                "%s was restored from a backup, or its files were cut: its ledger has %d entries and its "
                "audit log %d lines, and there were %d and %d. It will not train until it has settled a "
                "receipt: consilium server receipt %s %s",
                reply.site,
                reply.heads.ledger.count,
                reply.heads.audit.count,
                seen.ledger.count,
                seen.audit.count,
                reply.site,
                self.path.parent,
            )
            self.note(
                "behind",
                run=reply.run_uid,
                round=reply.server_round,
                site=reply.site,
                heads=asdict(reply.heads),
                seen=asdict(seen),
            )

    def _take_in(self, entry: AuditEntry) -> None:
        take_in_heads(self._seen, entry)
        if entry.event == "receipt":
            self._attested[entry.fields["site"]] = _heads(entry.fields["heads"])


def take_in_heads(seen: dict[str, SiteHeads], entry: AuditEntry) -> None:
    """Let one line of the log change what was `CoordinatorAudit.seen` before it."""
    fields = entry.fields
    if entry.event != "reply" or fields["error"] or fields["heads"] is None:
        return
    heads = _heads(fields["heads"])
    known = seen.get(fields["site"])
    # Two runs at once may hear of a site out of order; its ledger never shrinks.
    finished = fields["kind"] in ("train", "evaluate")
    if known is None or (finished and heads.ledger.count >= known.ledger.count):
        seen[fields["site"]] = heads


def _heads(content: Mapping[str, Any]) -> SiteHeads:
    return SiteHeads(ChainHead(**content["ledger"]), ChainHead(**content["audit"]))


def _is_behind(now: ChainHead, before: ChainHead) -> bool:
    """Whether a chain that was at `before` cannot have grown to `now`, as far as a head can tell."""
    return now.count < before.count or (now.count == before.count and now != before)


def _charge(task: Task, *, declared_size: int) -> dict[str, Scalar]:
    """What a site that does this task puts into its ledger, as far as it is known here.

    A noise_multiplier of "auto" is the site's to calibrate, from what stands beside it.
    """
    config = task.config
    noise: Scalar = 0.0
    rate = 1.0
    if config["privacy.unit"] != "none":
        noise = config["privacy.noise-multiplier"]
        rate = public_sample_rate(
            batch_size=int(config["train.batch-size"]), declared_size=declared_size
        )
    return {
        "unit": config["privacy.unit"],
        "noise_multiplier": noise,
        "sample_rate": rate,
        "steps": config["train.local-steps"],
        "planned_steps": int(config["train.local-steps"]) * int(config["train.rounds"]),
        "target_epsilon": config["privacy.target-epsilon"],
        "target_delta": config["privacy.target-delta"],
        "accountant": config["privacy.accountant"],
    }
