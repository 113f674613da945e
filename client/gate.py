"""Between a verified task and the records: policy, restored backups, approval, budget.

A task comes through all of it or not at all, in this order, and the charge is on disk before any record
is read.
"""

from __future__ import annotations

from dataclasses import asdict, replace

from client.approvals import Approvals, plan_of
from client.cost import RunCost, Speeds, run_cost
from client.ledger import Ledger, LedgerRow
from client.plan import TaskPlan, plan_task
from client.policy import check_task
from client.run_owners import RunOwners
from client.site_config import SiteConfig
from client.withdrawals import Withdrawals
from common.adapter import AdapterShape
from common.audit_log import AuditLog
from common.canonical import canonical_json, from_canonical
from common.errors import ApprovalError, BudgetError, ConfigError, RestoreError
from common.files import write_atomically
from common.model import choose_device
from common.model_folder import check_digest
from common.planned_model import PlannedModel, planned_model
from common.records import SiteHeads, Task, parse_heads


class Gate:
    """What a site asks before it trains."""

    def __init__(
        self,
        config: SiteConfig,
        *,
        ledger: Ledger,
        audit: AuditLog,
        approvals: Approvals,
        speeds: Speeds,
    ) -> None:
        self._config = config
        self._ledger = ledger
        self._audit = audit
        self._approvals = approvals
        self._speeds = speeds
        self._withdrawals = Withdrawals(config.folder)
        self._owners = RunOwners(config.folder / "state" / "run-owners", is_begun=ledger.has_run)
        self._seen_file = config.folder / "state" / "seen.json"

    def consider(self, task: Task, *, signer: str) -> TaskPlan:
        """Return what a task would cost, once policy and hospital allow its run; nothing is charged.

        signer: the coordinator's key that signed it. Raises PolicyError, RestoreError, ApprovalError,
        ConfigError, ProtocolError, PrivacyError, BudgetError, or as `planned` does.
        """
        self._withdrawals.check(signer)
        run = check_task(task, site=self._config)
        self._owners.check(task.run_uid, signer)
        if task.kind != "describe":
            self._check_not_restored(task)
        plan = plan_task(task, run, site=self._config, ledger=self._ledger)
        if self._config.policy.approval == "ask":
            self._check_approval(task, plan, signer)
        return plan

    def charge(self, plan: TaskPlan, *, signer: str) -> None:
        """Charge a task durably; one that has its charge keeps it. Its run is the signer's from then on.

        A run that is charged and whose file is gone becomes the signer's too.
        Raises BudgetError, which gives nobody the run, or PolicyError when it is another coordinator's.
        """
        config, charge = self._config, plan.charge
        self._owners.check(charge.run_uid, signer)
        self._owners.clear(charge.run_uid)
        row = self._ledger.reserve(
            charge,
            planned_steps=plan.run.total_steps,
            unit=config.data.unit,
            delta=config.data.delta,
            max_epsilon=config.policy.max_epsilon,
            accountant=plan.run.privacy.accountant,
        )
        if row.without_state != charge:
            raise BudgetError(
                f"task {charge.task_id[:12]} was charged as {row.without_state} and would now be trained "
                f"as {charge}; site.toml changed under a run, so let it begin anew"
            )
        self._owners.bind(charge.run_uid, signer)

    def planned(self, plan: TaskPlan, *, base_digest: str) -> PlannedModel:
        """Return the model and the adapter that a task trains and sends back; neither is loaded.

        Raises SignatureError when the folder is not the model that its digest names, ModelError when the
        adapter that is asked for does not fit it.
        """
        run, config = plan.run, self._config
        folder = config.models[run.model.name]
        check_digest(folder, base_digest)
        rank = min(run.lora.rank, config.policy.max_rank)
        return planned_model(folder, base_digest, run.lora, rank=rank)

    def incoming_shape(self, plan: TaskPlan, *, base_digest: str) -> AdapterShape:
        """Return what the adapter that comes with a task looks like. Raises as `planned` does."""
        shape = self.planned(plan, base_digest=base_digest).shape
        return shape.with_frozen(plan.run.round.frozen_rank)

    def cost(self, plan: TaskPlan, *, base_digest: str) -> RunCost:
        """Return what the whole run would cost this site."""
        run, config, whole = plan.run, self._config, plan.whole_run
        return run_cost(
            run,
            model=self.planned(plan, base_digest=base_digest),
            steps=whole,
            speeds=self._speeds,
            device=choose_device(config.device.name),
            max_rank=config.policy.max_rank,
            lifetime_epsilon_after=self._ledger.spent(
                config.data.name,
                unit=config.data.unit,
                delta=config.data.delta,
                more=[replace(plan.charge, steps=whole)],
            ),
        )

    def own_rows(self, run_uid: str) -> list[LedgerRow]:
        """Return the charges of one run on this site's data."""
        rows = self._ledger.rows(self._config.data.name)
        return [row for row in rows if row.run_uid == run_uid]

    def last_seen(self) -> SiteHeads | None:
        """Return this site's heads as the coordinator last had them, None before it said so.

        Raises ConfigError when the file that holds them cannot be read or is damaged.
        """
        try:
            return parse_heads(from_canonical(self._seen_file.read_bytes()))
        except FileNotFoundError:
            return None
        except OSError as error:
            wrong = f"cannot be read ({error.strerror})"
        except (ValueError, RecursionError):
            wrong = "is damaged"
        raise ConfigError(
            f"{self._seen_file} {wrong}; put its backup there, or remove it: the next task brings it again"
        )

    def _check_not_restored(self, task: Task) -> None:
        """A ledger or log behind what the coordinator last saw came from a backup, or was cut."""
        for seen in {self.last_seen(), task.seen} - {None}:
            if seen is not None and not self.stands_at(seen):
                raise RestoreError(
                    f"the coordinator last saw this site's ledger at entry {seen.ledger.count} and its "
                    f"audit log at line {seen.audit.count}; here they stand at "
                    f"{self._ledger.head().count} and {self._audit.head().count}, or differ: they were "
                    "restored from a backup, or cut. Ask the coordinator for a receipt (consilium server "
                    "receipt) and settle it: consilium client ledger --settle RECEIPT"
                )
        if task.seen is not None:
            self.note_seen(task.seen)

    def stands_at(self, seen: SiteHeads) -> bool:
        """Return whether ledger and log have been where they were seen, or were settled since."""
        # A settlement counts only where the audit log says so too, by a line that our key signed.
        settled = self._ledger.covers(seen.ledger) and self._audit.settled_ledger(seen.ledger)
        return self._audit.covers(seen.audit) and (self._ledger.stood_at(seen.ledger) or settled)

    def note_seen(self, seen: SiteHeads) -> None:
        """Remember how far others have seen this site, beside what it remembers of itself.

        Never less far: an old head, another coordinator's or a forged one, must not hide a newer one.
        """
        known = self.last_seen()
        if known is None or (
            seen.ledger.count >= known.ledger.count
            and seen.audit.count >= known.audit.count
            and seen != known
        ):
            write_atomically(self._seen_file, canonical_json(asdict(seen)), mode=0o600)

    def _check_approval(self, task: Task, plan: TaskPlan, signer: str) -> None:
        asked = plan_of(
            plan.run,
            run_uid=task.run_uid,
            base_digest=task.base_digest,
            coordinator=signer,
            max_rank=self._config.policy.max_rank,
        )
        asked_before = self._approvals.has_asked(task.run_uid)
        try:
            self._approvals.check(asked, cost=lambda: self.cost(plan, base_digest=task.base_digest))
        except ApprovalError:
            # The coordinator asks again every few seconds.
            if not asked_before:
                self._audit.append("waiting", run=task.run_uid, plan=asked.digest)
            raise
        if task.kind == "train":
            others = [
                row.steps.steps
                for row in self.own_rows(task.run_uid)
                if row.task_id != task.task_id
            ]
            self._approvals.check_steps(
                task.run_uid, charged_steps=sum(others), asked_steps=plan.charge.steps.steps
            )
