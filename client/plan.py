"""What a task would cost this site, from public constants only, before any record is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from client.ledger import Ledger, LedgerRow
from client.site_config import SiteConfig
from client.trainer import DpSettings
from common.config import RunConfig
from common.privacy import GaussianSteps, calibrate_noise, public_sample_rate
from common.records import Task


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """A task's noise at this site and its charge. dp: None trains without protection."""

    run: RunConfig
    dp: DpSettings | None
    charge: LedgerRow

    @property
    def whole_run(self) -> GaussianSteps:
        """All steps of the run at this task's setting."""
        one = self.charge.steps
        return GaussianSteps(one.noise_multiplier, one.sample_rate, self.run.total_steps)


def plan_task(task: Task, run: RunConfig, *, site: SiteConfig, ledger: Ledger) -> TaskPlan:
    """Return what a task costs this site. ledger: keeps what was calibrated.

    run: the task's own settings, checked against the policy. Raises PrivacyError when no noise
    reaches the target.
    """
    dp = dp_settings(run, declared_size=site.data.declared_size, calibrated=ledger.calibration)
    steps = (
        GaussianSteps(dp.noise_multiplier, dp.sample_rate, run.train.local_steps)
        if dp is not None
        else GaussianSteps(0.0, 1.0, run.train.local_steps)
    )
    charge = LedgerRow(
        task_id=task.task_id,
        run_uid=task.run_uid,
        dataset=site.data.name,
        unit=run.privacy.unit,
        server_round=task.server_round,
        steps=steps,
    )
    return TaskPlan(run, dp, charge)


def dp_settings(
    run: RunConfig,
    *,
    declared_size: int,
    calibrated: Callable[[str, Callable[[], float]], float] = lambda key, calibrate: calibrate(),
) -> DpSettings | None:
    """Return a run's noise and rate at a site of a declared size, None without protection.

    calibrated: keeps what was calibrated, by its inputs.
    Raises PrivacyError when no noise reaches the target.
    """
    if not run.use_dp:
        return None
    privacy = run.privacy
    rate = public_sample_rate(batch_size=run.train.batch_size, declared_size=declared_size)
    if isinstance(privacy.noise_multiplier, str):
        steps = run.total_steps
        inputs = (privacy.target_epsilon, privacy.target_delta, rate, steps, privacy.accountant)
        noise = calibrated(
            repr(inputs),
            lambda: calibrate_noise(
                target_epsilon=privacy.target_epsilon,
                delta=privacy.target_delta,
                sample_rate=rate,
                steps=steps,
                accountant=privacy.accountant,
            ),
        )
    else:
        noise = float(privacy.noise_multiplier)
    per_patient = privacy.max_records_per_patient if privacy.unit == "patient" else 0
    return DpSettings(noise, privacy.max_grad_norm, rate, max_records_per_patient=per_patient)
