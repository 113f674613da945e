"""The heart of a hospital: verify, policy, approval, ledger, data, train, egress, signed reply.

`Site.answer` is the one door: an envelope in, an envelope out. It is the same code in a hospital's
agent and in a simulation, where a site is a folder laid out exactly like a hospital's:

    site.toml  keys/signing.pem  (and the data, where site.toml says)
    state/  ledger.sqlite  audit.jsonl  seen.json  speed.json  outbox/  approvals/
           manifests/  run-owners/  evaluations/  trained-splits/  turn.lock  waiting/
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from client.approvals import Approvals
from client.cost import RunCost, Speeds
from client.evaluations import Evaluations
from client.evaluator import Evaluator
from client.examples import LocalExamples
from client.gate import Gate
from client.ledger import Ledger, Settlement
from client.noise import Entropy
from client.one_output import OneOutput, privacy_row
from client.outbox import Outbox
from client.plan import plan_task
from client.policy import check_run_uid, check_task
from client.refusals import Refusals
from client.replies import Replies
from client.sent import Manifest, Manifests, manifest_of
from client.settlement import Lag
from client.site_config import SiteConfig, load_site_config
from client.trained_splits import TrainedSplits
from client.training import Workbench
from client.turn import PATIENT, Caller, Turn
from common.adapter import max_safetensors_bytes
from common.audit_log import AuditLog
from common.config import RunConfig
from common.errors import (
    BusyError,
    ConsiliumError,
    DiskError,
    ProtocolError,
    SignatureError,
)
from common.files import is_disk_full
from common.receipts import Receipt, open_receipt
from common.records import (
    Envelope,
    SiteHeads,
    Task,
    check_not_expired,
    open_task,
)
from common.signing import TASK_DOMAIN, SigningKey, verify_any

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DryRun:
    """One whole task on the hospital's data of which nothing was sent or charged, and no result kept.

    manifest: what would leave. cost: of the whole run. local: how the records were read, which stays.
    """

    manifest: Manifest
    cost: RunCost
    local: LocalExamples


class Site:
    """One hospital's own side, opened from its folder.

    entropy: where sampling and noise under differential privacy come from. This argument is the one
    switch that makes them repeatable, for tests: no site.toml, environment variable, run config or
    task reaches it.
    """

    def __init__(
        self, config: SiteConfig, key: SigningKey, *, entropy: Entropy = os.urandom
    ) -> None:
        self.config = config
        self._key = key
        state = config.folder / "state"
        self.ledger = Ledger(state / "ledger.sqlite")
        self.audit = AuditLog(state / "audit.jsonl", key)
        self.refusals = Refusals(self.audit)
        self.approvals = Approvals(state / "approvals")
        self.manifests = Manifests(state / "manifests")
        self._replies = Replies(
            config, key, ledger=self.ledger, audit=self.audit, manifests=self.manifests
        )
        self._turn = Turn(state)
        speeds = Speeds(state / "speed.json")
        self._workbench = Workbench(config, speeds=speeds, entropy=entropy)
        self._gate = Gate(
            config,
            ledger=self.ledger,
            audit=self.audit,
            approvals=self.approvals,
            speeds=speeds,
        )
        splits = TrainedSplits(state / "trained-splits")
        self._evaluator = Evaluator(
            config,
            gate=self._gate,
            ledger=self.ledger,
            audit=self.audit,
            turn=self._turn,
            workbench=self._workbench,
            evaluations=Evaluations(state / "evaluations", most=config.policy.max_evaluations),
            splits=splits,
        )
        self._one_output = OneOutput(
            config,
            gate=self._gate,
            ledger=self.ledger,
            audit=self.audit,
            outbox=Outbox(state / "outbox"),
            turn=self._turn,
            workbench=self._workbench,
            splits=splits,
        )

    @classmethod
    def open(cls, folder: Path) -> Site:
        """Return the site of a folder. Raises ConfigError when its site.toml or key is unusable."""
        config = load_site_config(folder)
        return cls(config, SigningKey.load(config.signing_key_path))

    def answer(
        self, envelope: Envelope, *, now_s: float | None = None, caller: Caller = PATIENT
    ) -> Envelope:
        """Return the signed reply to a task.

        now_s: Unix seconds; the clock when None.
        Whatever goes wrong after the task is known to be the coordinator's leaves as a code and a
        correlation id. Raises SignatureError or ProtocolError, and answers nothing, before that; BusyError
        when another task is trained and the caller does not wait for it.
        """
        now_s = time.time() if now_s is None else now_s
        task, signer = self.admit(envelope, caller=caller)
        try:
            check_not_expired(task, now_s=now_s)
            # From here on by a clock that nobody sets.
            ends_s = time.monotonic() + task.expires_at - now_s
            check_run_uid(task.run_uid)
            if task.kind == "describe":
                return self._replies.seal(task, self._describe(task, signer))
            if task.kind == "evaluate":
                counted = self._evaluator.count(
                    task, envelope.adapter, signer, ends_s=ends_s, caller=caller
                )
                return self._replies.seal(task, counted)
            trained = self._one_output.of(
                task, envelope.adapter, signer, ends_s=ends_s, caller=caller
            )
            return self._replies.seal(
                task, trained.numbers, adapter=trained.adapter, privacy=trained.privacy
            )
        except BusyError:
            raise
        except Exception as error:
            if is_disk_full(error):
                error = DiskError(
                    f"a disk is full, that of {self.config.folder} or of temporary files; free some space, "
                    "and the task goes on when it is asked again"
                )
            return self._replies.refuse(task, error)

    def admit(self, envelope: Envelope, *, caller: Caller = PATIENT) -> tuple[Task, str]:
        """Return a task and the key that signed it, of a coordinator that this site believes.

        It needs no adapter: whoever sends one may be asked for it afterwards.
        Raises SignatureError or ProtocolError for any other task, BusyError as `answer` does.
        """
        try:
            signer = verify_any(
                envelope.payload,
                envelope.signature,
                domain=TASK_DOMAIN,
                public_keys=self.config.coordinator.public_keys,
            )
            task = open_task(envelope, public_keys=(signer,), site=self.config.site.name)
        except (SignatureError, ProtocolError) as error:
            self.refusals.note(envelope.payload, error)
            raise
        self.refusals.close_minute()
        if task.kind != "describe":
            self._turn.require_free(task, caller)
        return task, signer

    def adapter_limit(self, task: Task, signer: str, *, now_s: float | None = None) -> int:
        """Return the most bytes of adapter that a task can need; 0 when it is answered without one.

        signer: the key that signed it. now_s: Unix seconds; the clock when None.
        """
        if task.kind == "describe":
            return 0
        try:
            check_not_expired(task, now_s=time.time() if now_s is None else now_s)
            plan = self._gate.consider(task, signer=signer)
            return max_safetensors_bytes(
                self._gate.incoming_shape(plan, base_digest=task.base_digest)
            )
        except ConsiliumError:
            # `answer` will say why.
            return 0

    def dry_run(self, run: RunConfig, *, on_step: Callable[[int], None]) -> DryRun:
        """Return what one task of a run would give: nothing is sent or charged, and no result kept.

        on_step: is told each step done. Raises as a real task would, PolicyError first of all.
        """
        name, models = run.model.name, self.config.policy.allowed_models
        digest = next((model.digest for model in models if model.name == name), "")
        task = Task(
            kind="train",
            run_uid="dry-run",
            site=self.config.site.name,
            server_round=1,
            attempt=1,
            expires_at=0,
            base_digest=digest,
            config=run.for_sites(),
        )
        checked = check_task(task, site=self.config)
        plan = plan_task(task, checked, site=self.config, ledger=self.ledger)
        cost = self._gate.cost(plan, base_digest=digest)
        trained = self._workbench.train(task, checked, plan.dp, incoming=None, on_step=on_step)
        privacy = privacy_row(plan, rows=[plan.charge])
        manifest = manifest_of(trained.adapter, numbers=trained.numbers, privacy=privacy)
        return DryRun(manifest, cost, trained.local)

    @property
    def loaded_base(self) -> str:
        """The digest of the base model that is in memory, "" when none is."""
        return self._workbench.loaded_base

    def release_base(self) -> None:
        """Let base model and records leave the memory; the next task brings them back."""
        self._workbench.release()
        self._evaluator.release()

    def lag(self, receipt: bytes) -> Lag:
        """Return how far ledger and log stand behind the coordinator's receipt. Raises as `settle` does."""
        seen = self._open_receipt(receipt).heads
        return Lag(
            SiteHeads(self.ledger.head(), self.audit.head()), seen, self._gate.stands_at(seen)
        )

    def settle(self, receipt: bytes) -> Settlement:
        """Bring ledger and log of a restored site in line with the coordinator's receipt.

        Raises SignatureError or ProtocolError for a receipt that is not the coordinator's for this site.
        """
        opened = self._open_receipt(receipt)
        # Damaged, it would stop this after the ledger was changed.
        self.last_seen()
        data = self.config.data
        stands = self._gate.stands_at(opened.heads)
        settlement = self.ledger.settle(opened, dataset=data.name, unit=data.unit, delta=data.delta)
        if not stands:
            self.audit.settle(audit=opened.heads.audit, ledger=opened.heads.ledger)
        self._gate.note_seen(opened.heads)
        return settlement

    def approve(self, run_uid: str) -> None:
        """Let a waiting run begin. Raises ConfigError when no such run asked."""
        if self.approvals.find(run_uid).state != "declined":
            # First its line: there is no permission that is not on record.
            self.audit.append("approved", run=run_uid)
        self.approvals.approve(run_uid)

    def decline(self, run_uid: str) -> None:
        """Refuse a run for good. Raises ConfigError when no such run asked."""
        self.approvals.decline(run_uid)
        self.audit.append("declined", run=run_uid)

    def last_seen(self) -> SiteHeads | None:
        """Return this site's heads as the coordinator last had them, None before it said so."""
        return self._gate.last_seen()

    @property
    def public_key(self) -> str:
        """The public key of this site's signatures, 64 hex digits."""
        return self._key.public_hex

    def _open_receipt(self, receipt: bytes) -> Receipt:
        keys = self.config.coordinator.public_keys
        return open_receipt(receipt, public_keys=keys, site=self.config.site.name)

    def _describe(self, task: Task, signer: str) -> dict[str, float]:
        self._gate.consider(task, signer=signer)
        config = self.config
        return {"declared-size": config.data.declared_size, "max-rank": config.policy.max_rank}
