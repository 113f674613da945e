"""What a site's policy forbids, and that it says which line forbids it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.policy import check_run_uid, check_task, planned_records
from client.site_config import SiteConfig
from common.config import SENT_TO_SITES, RunConfig, Scalar
from common.errors import ConfigError, ConsiliumError, PolicyError, ProtocolError
from common.records import Task

DIGEST = "ab" * 32
# Each line of the policy set tightly, and a task that asks for exactly as much.
POLICY: dict[str, Any] = {
    "max-epsilon": 4.0,
    "max-delta": 1e-6,
    "allowed-models": [{"name": "tiny", "path": "models/tiny", "digest": DIGEST}],
    "max-rank": 8,
    "allowed-target-modules": ["q_proj", "v_proj"],
    "max-steps": 5,
    "max-grad-norm": 1.5,
    # 5 steps x 4 records x 32 tokens
    "max-tokens": 640,
}
AT_THE_LIMIT: dict[str, Scalar] = {
    "model.name": "tiny",
    "lora.rank": 8,
    "lora.target-modules": "q_proj, v_proj",
    "data.max-length": 32,
    "train.rounds": 3,
    "train.local-steps": 5,
    "train.batch-size": 4,
    "privacy.target-epsilon": 4.0,
    "privacy.target-delta": 1e-6,
    "privacy.max-grad-norm": 1.5,
}


def _site(
    policy: Mapping[str, Any] | None = None, data: Mapping[str, Any] | None = None
) -> SiteConfig:
    return SiteConfig.model_validate(
        {
            "site": {"name": "north"},
            "data": {"name": "notes", "path": "r.jsonl", "declared-size": 100, **(data or {})},
            "policy": {**POLICY, **(policy or {})},
            "coordinator": {"public-key": "0" * 64},
        }
    )


def _task(settings: Mapping[str, Scalar] | None = None, **changes: Any) -> Task:
    flat = RunConfig.parse(AT_THE_LIMIT).flat()
    config = {k: v for k, v in flat.items() if k.startswith(SENT_TO_SITES)}
    fields: dict[str, Any] = {
        "kind": "train",
        "run_uid": "run-1",
        "site": "north",
        "server_round": 1,
        "attempt": 1,
        "expires_at": 0,
        "base_digest": DIGEST,
        "config": {**config, **(settings or {})},
    }
    return Task(**{**fields, **changes})


def test_a_task_at_every_limit_is_allowed_and_its_settings_returned() -> None:
    run = check_task(_task(), site=_site())

    assert run.lora.rank == 8
    assert run.train.local_steps == 5


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"lora.rank": 9}, r"policy.max-rank = 8: the task asks for lora.rank 9"),
        ({"lora.rank": 4096}, r"policy.max-rank = 8: the task asks for lora.rank 4096"),
        ({"round.frozen-rank": 1}, r"policy.max-rank = 8: .* lora.rank 8 and round.frozen-rank 1"),
        (
            {"lora.rank": 2, "round.frozen-rank": 7},
            r"max-rank = 8: .* 2 and round.frozen-rank 7 bes",
        ),
        ({"train.local-steps": 6}, r"policy.max-steps = 5: .* train.local-steps 6"),
        ({"train.batch-size": 5}, r"policy.max-tokens = 640: .* 25 records of up to 32 tokens"),
        ({"data.max-length": 33}, r"policy.max-tokens = 640: .* 20 records of up to 33 tokens"),
        ({"data.max-length": 10**9}, r"policy.max-tokens"),
        ({"privacy.max-grad-norm": 1.6}, r"policy.max-grad-norm = 1.5: .* 1.6"),
        ({"privacy.max-grad-norm": 1e300}, r"policy.max-grad-norm"),
        ({"privacy.target-delta": 2e-6}, r"policy.max-delta = 1e-06: .* 2e-06"),
        ({"privacy.target-epsilon": 4.1}, r"policy.max-epsilon = 4.0: .* 4.1 in this run alone"),
        ({"privacy.unit": "none"}, r"policy.require-dp = true"),
        ({"privacy.unit": "patient"}, r"data.unit = 'record': .* 'patient'"),
        ({"model.name": "other"}, r"policy.allowed-models names \['tiny'\]: .* 'other'"),
        ({"lora.target-modules": "q_proj,k_proj"}, r"policy.allowed-target-modules = .* 'k_proj'"),
        ({"lora.target-modules": "all-linear"}, r"policy.allowed-target-modules = .* 'all-linear'"),
        ({"lora.target-modules": ""}, r"policy.allowed-target-modules"),
    ],
)
def test_one_step_beyond_a_line_is_refused_and_the_line_named(
    settings: Mapping[str, Scalar], line: str
) -> None:
    with pytest.raises(PolicyError, match=line):
        check_task(_task(settings), site=_site())


def test_ranks_that_are_not_trained_count_towards_the_highest() -> None:
    run = check_task(_task({"lora.rank": 3, "round.frozen-rank": 5}), site=_site())
    assert (run.lora.rank, run.round.frozen_rank) == (3, 5)


def test_every_line_that_forbids_a_task_is_named_at_once() -> None:
    with pytest.raises(PolicyError, match=r"policy.max-rank.*; policy.max-steps.*; policy.max-tok"):
        check_task(_task({"lora.rank": 9, "train.local-steps": 6}), site=_site())


def test_a_model_is_known_by_name_and_digest_together() -> None:
    two = [
        {"name": "tiny", "path": "a", "digest": DIGEST},
        {"name": "other", "path": "b", "digest": "cd" * 32},
    ]

    with pytest.raises(PolicyError, match=r"'tiny' with digest abababababababab\.\.\.: the task's"):
        check_task(_task(base_digest="cd" * 32), site=_site({"allowed-models": two}))


def test_an_empty_list_allows_nothing() -> None:
    with pytest.raises(PolicyError, match=r"policy.allowed-models names no model at all"):
        check_task(_task(), site=_site({"allowed-models": []}))
    with pytest.raises(PolicyError, match=r"policy.allowed-target-modules = \[\]"):
        check_task(_task(), site=_site({"allowed-target-modules": []}))


def test_all_linear_in_the_policy_allows_any_module() -> None:
    for modules in ("all-linear", "k_proj,anything"):
        check_task(
            _task({"lora.target-modules": modules}),
            site=_site({"allowed-target-modules": ["all-linear"]}),
        )


def test_a_patients_records_count_towards_the_tokens() -> None:
    patients = {"unit": "patient", "patient-id": "patient"}
    asked: dict[str, Scalar] = {"privacy.unit": "patient", "privacy.max-records-per-patient": 2}

    with pytest.raises(PolicyError, match=r"40 records of up to 32 tokens"):
        check_task(_task(asked), site=_site(data=patients))
    check_task(_task(asked), site=_site({"max-tokens": 1280}, patients))
    with pytest.raises(PolicyError, match=r"data.unit = 'patient': .* privacy.unit 'record'"):
        check_task(_task(), site=_site(data=patients))


def test_the_records_of_a_task_are_counted_by_unit() -> None:
    settings: dict[str, Scalar] = {"train.local-steps": 3, "train.batch-size": 5}
    patient: dict[str, Scalar] = {"privacy.unit": "patient", "privacy.max-records-per-patient": 2}

    assert planned_records(RunConfig.parse(settings)) == 15
    assert planned_records(RunConfig.parse({**settings, **patient})) == 30


def test_a_noise_multiplier_of_its_own_leaves_epsilon_to_the_ledger() -> None:
    """The target is then only a number; what the noise costs is computed where it is charged."""
    asked: dict[str, Scalar] = {"privacy.noise-multiplier": 1.0, "privacy.target-epsilon": 50.0}

    check_task(_task(asked), site=_site())


def test_no_privacy_where_the_policy_does_not_require_it() -> None:
    lax = _site({"require-dp": False})

    assert not check_task(_task({"privacy.unit": "none"}), site=lax).use_dp


@pytest.mark.parametrize(
    ("kind", "server_round"), [("train", 0), ("train", 4), ("train", 9999), ("describe", 1)]
)
def test_a_round_that_the_run_does_not_have_is_refused(kind: str, server_round: int) -> None:
    with pytest.raises(PolicyError, match=f"round {server_round} does not exist"):
        check_task(_task(kind=kind, server_round=server_round), site=_site())


def test_a_describe_is_held_against_the_same_lines() -> None:
    assert check_task(_task(kind="describe", server_round=0), site=_site()).train.rounds == 3
    with pytest.raises(PolicyError, match=r"policy.max-steps"):
        check_task(_task({"train.local-steps": 6}, kind="describe", server_round=0), site=_site())


def test_a_describe_may_ask_for_a_rank_that_the_coordinator_will_cut() -> None:
    asked: dict[str, Scalar] = {"lora.rank": 64}

    check_task(_task(asked, kind="describe", server_round=0), site=_site())
    with pytest.raises(PolicyError, match=r"policy.max-rank"):
        check_task(_task(asked), site=_site())


def test_a_template_that_could_fail_on_a_record_is_refused_before_there_is_one() -> None:
    with pytest.raises(ConfigError, match="prompt-template"):
        check_task(_task({"data.prompt-template": "{instruction.__class__}"}), site=_site())


@pytest.mark.parametrize(
    "run_uid",
    ["", ".", "..", "../run", "a/b", "a\\b", "/etc/passwd", "run 1", "run\n", ".run", "-run", "a" * 65,
     "run\x00", "rün"],
)  # fmt: skip
def test_a_run_is_named_as_a_file_may_be(run_uid: str) -> None:
    with pytest.raises(ProtocolError, match="a run is named by"):
        check_task(_task(run_uid=run_uid), site=_site())


def test_ordinary_run_names_pass() -> None:
    for run_uid in ("1", "run-1", "0f" * 32, "Trial_2.b"):
        assert check_run_uid(run_uid) == run_uid


def test_a_refusal_quotes_no_more_than_a_line_of_what_was_asked() -> None:
    """It is written to the hospital's log, and the other side chooses how long it is."""
    long = "x" * 10_000

    with pytest.raises(PolicyError, match="policy.allowed-models") as caught:
        check_task(_task({"model.name": long, "lora.target-modules": long}), site=_site())
    assert len(str(caught.value)) < 1000
    with pytest.raises(ProtocolError, match="a run is named by") as other:
        check_task(_task(run_uid=long), site=_site())
    assert len(str(other.value)) < 300


_TIGHTER: dict[str, st.SearchStrategy[Any]] = {
    "max-epsilon": st.floats(0.1, 4.0),
    "max-delta": st.floats(1e-9, 1e-6),
    "max-rank": st.integers(1, 8),
    "max-steps": st.integers(1, 5),
    "max-grad-norm": st.floats(0.1, 1.5),
    "max-tokens": st.integers(1, 640),
    "allowed-target-modules": st.sampled_from([["q_proj", "v_proj"], ["q_proj"], []]),
}
_ASKED: dict[str, st.SearchStrategy[Any]] = {
    "lora.rank": st.integers(1, 12),
    "train.local-steps": st.integers(1, 8),
    "data.max-length": st.integers(8, 40),
    "privacy.max-grad-norm": st.floats(0.1, 2.0),
    "privacy.target-epsilon": st.floats(0.1, 6.0),
    "privacy.target-delta": st.floats(1e-9, 2e-6),
    "lora.target-modules": st.sampled_from(["q_proj", "q_proj,v_proj", "k_proj"]),
}


@given(asked=st.fixed_dictionaries({}, optional=_ASKED), policy=st.fixed_dictionaries(_TIGHTER))
def test_a_tighter_policy_never_allows_what_a_looser_one_forbids(
    asked: dict[str, Scalar], policy: dict[str, Any]
) -> None:
    def allowed(site: SiteConfig) -> bool:
        try:
            check_task(_task(asked), site=site)
        except ConsiliumError:
            return False
        return True

    assert allowed(_site()) or not allowed(_site(policy))
