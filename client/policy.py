"""What this site will do at all. Every check compares a task with site.toml; none trusts the task.

The coordinator can only ask for less: each refusal names the line of site.toml that it ran against.
It fails closed: a list that is empty allows nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from client.site_config import SiteConfig
from common.config import RUN_UID, RunConfig
from common.errors import PolicyError, ProtocolError
from common.prompts import resolve_template
from common.records import Task

# A refusal is a line in the hospital's log, and what it quotes comes from outside.
_MAX_QUOTED = 80


def check_task(task: Task, *, site: SiteConfig) -> RunConfig:
    """Return a task's settings after holding every one of them against the site's policy.

    A `describe` with settings is held against the same lines but policy.max-rank: its answer says which
    rank this site can hold, and the coordinator then asks for no more.
    Raises PolicyError naming every policy line that forbids the task, ConfigError when its settings are
    not valid by themselves, ProtocolError when its run has no name to file it under.
    """
    check_run_uid(task.run_uid)
    run = RunConfig.parse(task.config)
    resolve_template(run.data.prompt_template)
    refusals = [
        *_round(task, run),
        *(evaluation_refusals(run, site) if task.kind == "evaluate" else ()),
        *_model(task, run, site),
        *_adapter(task, run, site),
        *_work(run, site),
        *_privacy(run, site),
    ]
    if refusals:
        raise PolicyError("; ".join(refusals))
    return run


def check_run_uid(run_uid: str) -> str:
    """Return a run's name when it is one that a file may bear. Raises ProtocolError otherwise."""
    if re.fullmatch(RUN_UID, run_uid) is None:
        raise ProtocolError(
            f"a run is named by 1 to 64 letters, digits, '.', '_' and '-', not {_quoted(run_uid)}"
        )
    return run_uid


def planned_records(run: RunConfig) -> int:
    """Return how many records one task may pass through the model, as far as its settings tell."""
    per_unit = run.privacy.max_records_per_patient if run.privacy.unit == "patient" else 1
    return run.train.local_steps * run.train.batch_size * per_unit


def _round(task: Task, run: RunConfig) -> Iterator[str]:
    first, last = (0, 0) if task.kind == "describe" else (1, run.train.rounds)
    if not first <= task.server_round <= last:
        yield f"round {task.server_round} does not exist: a {task.kind} has rounds {first} to {last}"


def evaluation_refusals(run: RunConfig, site: SiteConfig) -> Iterator[str]:
    """Yield why a site counts no test records for a run, as far as its site.toml tells."""
    if "evaluation" not in site.policy.release_metrics:
        yield (
            f"policy.release-metrics = {list(site.policy.release_metrics)}: the task asks for sums over the "
            'test records, which "evaluation" there would allow'
        )
    split = site.data.evaluation_split
    # "" trains on the rows of every split.
    if run.data.split in (split, ""):
        yield (
            f"data.evaluation-split = {split!r} is part of what this run trained on (data.split = "
            f"{run.data.split!r}); only records of another split are counted"
        )


def _model(task: Task, run: RunConfig, site: SiteConfig) -> Iterator[str]:
    allowed = {model.name: model.digest for model in site.policy.allowed_models}
    digest = allowed.get(run.model.name)
    if digest is None:
        yield (
            f"policy.allowed-models names {sorted(allowed) or 'no model at all'}: the task asks for "
            f"model.name {_quoted(run.model.name)}"
        )
    elif task.base_digest != digest:
        yield (
            f"policy.allowed-models holds {_quoted(run.model.name)} with digest {digest[:16]}...: the "
            f"task's model has {_quoted(task.base_digest[:16])}..."
        )


def _adapter(task: Task, run: RunConfig, site: SiteConfig) -> Iterator[str]:
    policy = site.policy
    frozen = run.round.frozen_rank
    if task.kind != "describe" and run.lora.rank + frozen > policy.max_rank:
        beside = f" and round.frozen-rank {frozen} beside it" if frozen else ""
        yield (
            f"policy.max-rank = {policy.max_rank}: the task asks for lora.rank {run.lora.rank}{beside}"
        )
    allowed = policy.allowed_target_modules
    asked = [name.strip() for name in run.lora.target_modules.split(",")]
    forbidden = [name for name in asked if name not in allowed]
    if "all-linear" not in allowed and forbidden:
        yield (
            f"policy.allowed-target-modules = {list(allowed)}: the task asks for lora.target-modules "
            f"{_quoted(', '.join(forbidden))}"
        )


def _work(run: RunConfig, site: SiteConfig) -> Iterator[str]:
    policy = site.policy
    if run.train.local_steps > policy.max_steps:
        yield (
            f"policy.max-steps = {policy.max_steps}: the task asks for train.local-steps "
            f"{run.train.local_steps}"
        )
    records = planned_records(run)
    per_patient = " x privacy.max-records-per-patient" if run.privacy.unit == "patient" else ""
    if records * run.data.max_length > policy.max_tokens:
        yield (
            f"policy.max-tokens = {policy.max_tokens}: the task asks for {records} records of up to "
            f"{run.data.max_length} tokens (train.local-steps x train.batch-size"
            f"{per_patient} x data.max-length)"
        )


def _privacy(run: RunConfig, site: SiteConfig) -> Iterator[str]:
    policy, asked = site.policy, run.privacy
    if not run.use_dp:
        if policy.require_dp:
            yield "policy.require-dp = true: the task asks for privacy.unit 'none'"
        return
    if asked.unit != site.data.unit:
        yield f"data.unit = {site.data.unit!r}: the task asks for privacy.unit {asked.unit!r}"
    if asked.target_delta > policy.max_delta:
        yield (
            f"policy.max-delta = {policy.max_delta}: the task asks for privacy.target-delta "
            f"{asked.target_delta}"
        )
    if asked.max_grad_norm > policy.max_grad_norm:
        yield (
            f"policy.max-grad-norm = {policy.max_grad_norm}: the task asks for privacy.max-grad-norm "
            f"{asked.max_grad_norm}"
        )
    # With a noise multiplier of its own the target says nothing: the ledger computes what it costs.
    if asked.noise_multiplier == "auto" and asked.target_epsilon > policy.max_epsilon:
        yield (
            f"policy.max-epsilon = {policy.max_epsilon}: the task asks for privacy.target-epsilon "
            f"{asked.target_epsilon} in this run alone"
        )


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "...")
