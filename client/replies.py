"""What leaves a site: replies, each on record before it is signed, and refusals, which say a code."""

from __future__ import annotations

import logging
import traceback
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from client.egress import CheckedAdapter, check_numbers
from client.ledger import Ledger
from client.sent import Manifests, manifest_of
from client.site_config import SiteConfig
from common.audit_log import AuditLog
from common.errors import ApprovalError, AuditError, BudgetError, ConsiliumError
from common.records import (
    Envelope,
    PrivacyRow,
    Reply,
    SiteHeads,
    Task,
    error_code,
    reply_to,
    seal_reply,
)
from common.signing import SigningKey

# A refusal may quote what was asked, whose length is the other side's choice.
_MAX_WHY = 2000

logger = logging.getLogger(__name__)


class FailedTaskError(Exception):
    """A task whose one answer is that it failed. failure: the code that leaves."""

    def __init__(self, failure: str) -> None:
        super().__init__(f"training failed ({failure}); that is this task's one answer")
        self.failure = failure


class Replies:
    """Makes and signs one site's replies."""

    def __init__(
        self,
        config: SiteConfig,
        key: SigningKey,
        *,
        ledger: Ledger,
        audit: AuditLog,
        manifests: Manifests,
    ) -> None:
        self._config = config
        self._key = key
        self._ledger = ledger
        self._audit = audit
        self._manifests = manifests

    def seal(
        self,
        task: Task,
        numbers: Mapping[str, float],
        *,
        adapter: CheckedAdapter | None = None,
        privacy: PrivacyRow | None = None,
    ) -> Envelope:
        """Write the receipt of what is about to leave, then sign it."""
        policy = self._config.policy
        numbers = check_numbers(
            numbers, released=policy.release_metrics, digits=policy.metric_digits
        )
        manifest = manifest_of(adapter, numbers=numbers, privacy=privacy)
        self._audit.append(
            "sent",
            task_sha256=task.sha256,
            run=task.run_uid,
            round=task.server_round,
            manifest=self._manifests.store(manifest),
            adapter_digest=manifest.adapter_digest,
            size_bytes=manifest.adapter_bytes,
            tensors=len(manifest.tensors),
            numbers=dict(numbers),
            privacy=None if privacy is None else asdict(privacy),
        )
        logger.info(
            "run %s round %d: reply of %d adapter bytes",
            task.run_uid,
            task.server_round,
            manifest.adapter_bytes,
        )
        digest = manifest.adapter_digest
        reply = self._reply(task, numbers=numbers, adapter_digest=digest, privacy=privacy)
        return seal_reply(reply, self._key, adapter=b"" if adapter is None else adapter.data)

    def refuse(self, task: Task, error: Exception) -> Envelope:
        """Return the reply to a task that was refused or failed; the reason stays here."""
        code = error.failure if isinstance(error, FailedTaskError) else error_code(error)
        correlation_id, text = uuid.uuid4().hex[:12], in_words(error)
        if isinstance(error, ApprovalError):
            correlation_id = ""
            # On record already, and asked again every few seconds.
            logger.info("%s", text)
        else:
            logger.error("task refused or failed [%s]: %s", correlation_id, text)
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.debug("where [%s]:\n%s", correlation_id, frames)
            self._audit.append(
                "refused",
                task_sha256=task.sha256,
                code=code,
                why=text,
                correlation_id=correlation_id,
            )
        return seal_reply(
            self._reply(task, error_code=code, correlation_id=correlation_id), self._key
        )

    def _reply(self, task: Task, **content: Any) -> Reply:
        try:
            heads = SiteHeads(self._ledger.head(), self._audit.head())
        except (BudgetError, AuditError):
            # A damaged ledger or log is itself a reason to refuse, and to say so by its code.
            if not content.get("error_code"):
                raise
            heads = None
        return reply_to(task, site=self._config.site.name, heads=heads, **content)


def in_words(error: Exception) -> str:
    """An error in words: a third party's message may quote a record, its type and our own do not."""
    ours = isinstance(error, ConsiliumError | FailedTaskError)
    return str(error)[:_MAX_WHY] if ours else type(error).__name__
