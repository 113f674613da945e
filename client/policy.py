"""What this site will do at all. Every check compares a task with site.toml; none trusts the task."""

from __future__ import annotations

from client.site_config import SiteConfig
from common.config import RunConfig
from common.errors import PolicyError
from common.records import Task


def check_task(task: Task, *, site: SiteConfig) -> RunConfig:
    """Return a train task's settings after holding them against the site's policy.

    Raises PolicyError naming the policy line that forbids it, ConfigError when the task's settings
    are not valid by themselves.
    """
    policy = site.policy
    config = RunConfig.parse(task.config)
    if task.base_digest not in {model.digest for model in policy.allowed_models}:
        raise PolicyError(
            f"policy.allowed-models holds no model with digest {task.base_digest[:16]}..."
        )
    if config.model.name not in site.models:
        raise PolicyError(
            f"policy.allowed-models does not name {config.model.name!r}, only {sorted(site.models)}"
        )
    if config.lora.rank > policy.max_rank:
        raise PolicyError(
            f"lora.rank {config.lora.rank} is above policy.max-rank {policy.max_rank}"
        )
    if config.train.local_steps > policy.max_steps:
        raise PolicyError(
            f"train.local-steps {config.train.local_steps} is above policy.max-steps "
            f"{policy.max_steps}"
        )
    if not 1 <= task.server_round <= config.train.rounds:
        raise PolicyError(f"round {task.server_round} of {config.train.rounds} does not exist")
    _check_privacy(config, site=site)
    return config


def _check_privacy(config: RunConfig, *, site: SiteConfig) -> None:
    policy = site.policy
    if not config.use_dp:
        if policy.require_dp:
            raise PolicyError("policy.require-dp is true and the task asks for no privacy")
        return
    if config.privacy.unit != site.data.unit:
        raise PolicyError(
            f"privacy.unit {config.privacy.unit!r}, but data.unit of this data set is "
            f"{site.data.unit!r}"
        )
    if config.privacy.target_delta > policy.max_delta:
        raise PolicyError(
            f"privacy.target-delta {config.privacy.target_delta} is above policy.max-delta "
            f"{policy.max_delta}"
        )
