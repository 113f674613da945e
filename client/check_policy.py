"""Does site.toml's policy say what a hospital means to say? It forbids nothing here: it is only read."""

from __future__ import annotations

import math
from collections.abc import Iterator

from client.check_line import CheckLine, failed, passed, warned
from client.site_config import SITE_FILE, SiteConfig


def check_policy(config: SiteConfig) -> Iterator[CheckLine]:
    """Look for what `client init` left open, and for what protects less than it seems to."""
    yield _models(config)
    yield _epsilon(config)
    yield _delta(config)
    yield _release(config)


def _models(config: SiteConfig) -> CheckLine:
    names = [model.name for model in config.policy.allowed_models]
    if names:
        return passed("allowed models", ", ".join(names))
    return failed(
        "allowed models",
        f"policy.allowed-models in {SITE_FILE} is empty, so every task is refused",
        "name the model with its folder and the digest that `consilium model digest PATH` prints",
    )


def _epsilon(config: SiteConfig) -> CheckLine:
    policy = config.policy
    approval = (
        "every run waits for `consilium client approve`"
        if policy.approval == "ask"
        else "what the policy allows runs without asking"
    )
    if math.isinf(policy.max_epsilon):
        return warned(
            "budget",
            f"policy.max-epsilon = inf is no cap at all; {approval}",
            "set the most that may ever be spent on this data set, 8.0 for instance",
        )
    return passed(
        "budget", f"epsilon {policy.max_epsilon:g} for {config.data.name!r}, ever; {approval}"
    )


def _delta(config: SiteConfig) -> CheckLine:
    declared = config.data.declared_size
    limit = 1 / declared
    deltas = {"data.delta": config.data.delta, "policy.max-delta": config.policy.max_delta}
    detail = ", ".join(f"{key} {value:g}" for key, value in deltas.items())
    if any(delta >= limit for delta in deltas.values()):
        return failed(
            "delta",
            f"{detail}: not below 1 / {declared} {config.data.unit}s, so it would cover for publishing one "
            "of them",
            f"set both below {limit:.1e} in {SITE_FILE}; data.delta stays for the data set's whole life",
        )
    return passed("delta", f"{detail}, below 1 / {declared} {config.data.unit}s")


def _release(config: SiteConfig) -> CheckLine:
    policy = config.policy
    said = [] if policy.require_dp else ["runs without differential privacy are allowed"]
    if policy.release_metrics:
        said.append(f"{', '.join(policy.release_metrics)} may leave, which epsilon does not count")
    if said:
        return warned(
            "release",
            "; ".join(said),
            f"if that is not meant, set require-dp = true and release-metrics = [] in {SITE_FILE}",
        )
    return passed("release", "adapters under differential privacy, and no number about the records")
