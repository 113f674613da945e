"""RunConfig: defaults, types, contradictions, and the words in which mistakes are reported."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from common.config import (
    COORDINATOR_ONLY,
    SENT_TO_SITES,
    RunConfig,
    default_table,
    flatten,
    load_run_config,
    parse_overrides,
    read_toml,
)
from common.errors import ConfigError

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_no_keys_give_the_defaults() -> None:
    assert RunConfig.parse({}) == RunConfig()


def test_pyproject_holds_exactly_the_defaults() -> None:
    table = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    ours = RunConfig().flat()

    assert list(flatten(table).items()) == list(ours.items())
    assert [type(value) for value in flatten(table).values()] == [type(v) for v in ours.values()]


def test_printed_default_table_is_toml_of_the_defaults() -> None:
    assert flatten(tomllib.loads(default_table())) == RunConfig().flat()


def test_flat_form_parses_back_to_the_same_tree() -> None:
    config = RunConfig.parse({"lora.rank": 4, "privacy.noise-multiplier": 0.8, "run.uid": "r1"})

    assert RunConfig.parse(config.flat()) == config
    assert config.flat()["lora.rank"] == 4
    assert set(config.flat()) == set(RunConfig().flat())


def test_every_section_is_sent_or_kept_or_the_federations_own() -> None:
    sections = {key.split(".")[0] + "." for key in RunConfig().flat()}

    assert set(SENT_TO_SITES) | set(COORDINATOR_ONLY) <= sections
    assert not set(SENT_TO_SITES) & set(COORDINATOR_ONLY)
    assert sections - set(SENT_TO_SITES) - set(COORDINATOR_ONLY) == {
        "federation.",
        "aggregation.",
        "run.",
    }


def test_all_bad_keys_and_values_are_reported_at_once_with_suggestions() -> None:
    with pytest.raises(ConfigError, match="4 bad settings") as caught:
        RunConfig.parse(
            {
                "train.local_steps": 3,
                "nonsense": 1,
                "lora.rank": "eight",
                "privacy.unit": "patience",
                "train.rounds": 3,
            }
        )

    text = str(caught.value)
    assert "train.local_steps: no such key; did you mean train.local-steps?" in text
    assert "\n  nonsense: no such key\n" in text
    assert "lora.rank = 'eight': Input should be a valid integer" in text
    assert "privacy.unit = 'patience': Input should be 'record', 'patient' or 'none'" in text
    assert "train.rounds" not in text


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("lora.rank", "8", "valid integer"),
        ("lora.rank", 8.0, "valid integer"),
        ("lora.rank", True, "valid integer"),
        ("lora.rank", 0, "greater than or equal to 1"),
        ("lora.use-rslora", 1, "valid boolean"),
        ("lora.dropout", 1.0, "less than 1"),
        ("model.name", 7, "valid string"),
        ("model.quantization", "nf3", "'nf4', 'int8' or 'none'"),
        ("train.learning-rate", math.inf, "finite number"),
        ("train.learning-rate", 0.0, "greater than 0"),
        ("train.seed", -1, "greater than or equal to 0"),
        ("privacy.max-grad-norm", math.inf, "finite number"),
        ("privacy.target-epsilon", math.inf, "finite number"),
        ("privacy.target-epsilon", math.nan, "finite number"),
        ("privacy.target-delta", 0.0, "greater than 0"),
        ("federation.fraction", 1.5, "less than or equal to 1"),
        ("federation.deadline-s", math.inf, "finite number"),
        ("privacy.max-records-per-patient", 0, "greater than or equal to 1"),
    ],
)
def test_value_of_the_wrong_type_or_range_is_refused(key: str, value: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=f"1 bad setting:\n  {key}.*{why}"):
        RunConfig.parse({key: value})


def test_whole_number_is_taken_where_a_fraction_is_meant() -> None:
    alpha = RunConfig.parse({"lora.alpha": 16}).lora.alpha

    assert (alpha, type(alpha)) == (16.0, float)


@pytest.mark.parametrize("value", [0, 0.0, -0.5, math.inf, -math.inf, math.nan])
def test_noise_multiplier_that_gives_no_privacy_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=r"1 bad setting:\n.*gives no privacy.*privacy.unit"):
        RunConfig.parse({"privacy.noise-multiplier": value})


@pytest.mark.parametrize("value", ["off", "none", "0", "Auto", "", True, None])
def test_noise_multiplier_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match='1 bad setting:\n.*neither "auto" nor a number'):
        RunConfig.parse({"privacy.noise-multiplier": value})


@pytest.mark.parametrize(("value", "expected"), [("auto", "auto"), (0.8, 0.8), (1, 1.0)])
def test_noise_multiplier_auto_or_above_zero_is_taken(value: Any, expected: Any) -> None:
    found = RunConfig.parse({"privacy.noise-multiplier": value}).privacy.noise_multiplier

    assert (found, type(found)) == (expected, type(expected))


def test_dora_is_refused_and_why_depends_on_privacy() -> None:
    with pytest.raises(ConfigError, match=r"lora.use-dora = true with privacy.unit = 'record'"):
        RunConfig.parse({"lora.use-dora": True})

    with pytest.raises(ConfigError, match=r"only the factors A and B travel"):
        RunConfig.parse({"lora.use-dora": True, "privacy.unit": "none"})


def test_quorum_above_min_sites_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"federation.quorum = 3 is above .* = 2"):
        RunConfig.parse({"federation.quorum": 3})

    assert RunConfig.parse({"federation.quorum": 3, "federation.min-sites": 3}).quorum == 3


def test_quorum_zero_means_min_sites() -> None:
    assert RunConfig.parse({"federation.min-sites": 5}).quorum == 5


def test_delta_that_protects_nobody_is_refused_under_dp_only() -> None:
    with pytest.raises(ConfigError, match=r"target-delta = 0.01.*protects nobody"):
        RunConfig.parse({"privacy.target-delta": 0.01})

    assert not RunConfig.parse({"privacy.target-delta": 0.01, "privacy.unit": "none"}).use_dp


def test_contradictions_are_reported_together() -> None:
    with pytest.raises(ConfigError, match="2 bad settings"):
        RunConfig.parse({"lora.use-dora": True, "federation.quorum": 9})


def test_total_steps_are_rounds_times_local_steps() -> None:
    assert RunConfig.parse({"train.rounds": 3, "train.local-steps": 7}).total_steps == 21


def test_tree_is_frozen_down_to_its_leaves() -> None:
    config = RunConfig()

    with pytest.raises(ValidationError, match="frozen"):
        config.lora.rank = 4
    with pytest.raises(ValidationError, match="frozen"):
        config.lora = RunConfig.parse({"lora.rank": 4}).lora
    assert RunConfig().lora.rank == config.lora.rank


def test_replace_changes_only_what_it_names_and_checks_it() -> None:
    config = RunConfig.parse({"lora.rank": 4})

    changed = config.replace({"train.rounds": 2})

    assert (changed.lora.rank, changed.train.rounds, config.train.rounds) == (4, 2, 5)
    with pytest.raises(ConfigError, match=r"train.round: no such key; did you mean train.rounds\?"):
        config.replace({"train.round": 2})


def test_nested_tables_and_dotted_keys_parse_alike(tmp_path: Path) -> None:
    nested, dotted = tmp_path / "nested.toml", tmp_path / "dotted.toml"
    nested.write_text('[lora]\nrank = 4\n[privacy]\nunit = "none"\n')
    dotted.write_text('lora.rank = 4\n"privacy.unit" = "none"\n')

    assert load_run_config(nested) == load_run_config(dotted)
    assert load_run_config(nested).lora.rank == 4


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("lora.rank = 4\ntrain.rounds = 2\n")

    config = load_run_config(path, overrides=["lora.rank=6", "lora.target-modules=q_proj,v_proj"])

    assert (config.lora.rank, config.train.rounds) == (6, 2)
    assert config.lora.target_modules == "q_proj,v_proj"


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("k=1", 1),
        ("k=1.5", 1.5),
        ("k=1e-5", 1e-5),
        ("k=true", True),
        ('k="1"', "1"),
        ("k = auto", "auto"),
        ("k=/data/my model", "/data/my model"),
        ("k=a=b", "a=b"),
        ("k=", ""),
        ("k=2024-01-01", "2024-01-01"),
        ("k=[1, 2]", "[1, 2]"),
    ],
)
def test_override_is_read_as_toml_scalar_else_as_text(word: str, value: Any) -> None:
    parsed = parse_overrides([word])

    assert parsed == {"k": value}
    assert type(parsed["k"]) is type(value)


def test_override_without_equals_sign_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--set 'lora.rank' has no '='"):
        parse_overrides(["lora.rank"])


def test_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file .*absent.toml"):
        read_toml(tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("lora.rank = \n")
    with pytest.raises(ConfigError, match=r"broken.toml is not valid TOML.*line 1"):
        read_toml(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        read_toml(broken)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(tmp_path)


@given(
    st.dictionaries(
        st.text("abc", min_size=1),
        st.integers() | st.dictionaries(st.text("abc", min_size=1), st.integers(), min_size=1),
    )
)
def test_flattening_loses_no_leaf(tree: dict[str, Any]) -> None:
    leaves = sum(len(value) if isinstance(value, dict) else 1 for value in tree.values())

    flat = flatten(tree)

    assert len(flat) == leaves
    assert all(
        flat[f"{k}.{n}"] == leaf
        for k, value in tree.items()
        if isinstance(value, dict)
        for n, leaf in value.items()
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("privacy.noise-multiplier", 1e-160),
        ("privacy.noise-multiplier", 1e200),
        ("privacy.target-epsilon", 1e18),
        ("train.rounds", 10**9),
    ],
)
def test_a_setting_that_would_keep_an_accountant_busy_for_ever_is_refused(
    key: str, value: float
) -> None:
    with pytest.raises(ConfigError, match=key):
        RunConfig.parse({key: value})


def test_a_patients_records_must_fit_into_one_micro_batch() -> None:
    patients = {"privacy.unit": "patient", "train.micro-batch-size": 4}
    assert RunConfig.parse({**patients, "privacy.max-records-per-patient": 4}).use_dp
    with pytest.raises(ConfigError, match="a patient's records are never split"):
        RunConfig.parse({**patients, "privacy.max-records-per-patient": 5})


@pytest.mark.parametrize("text", ["q_proj", "q_proj=0", "q_proj=inf", "a b=3", "q=1,q=2", "=3"])
def test_a_malformed_alpha_pattern_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="lora.alpha-pattern"):
        RunConfig.parse({"lora.alpha-pattern": text})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"aggregation.method": "weighted", "aggregation.server-momentum": 0.9}, "server-momentum"),
        ({"aggregation.method": "stack", "aggregation.server-momentum": 0.9}, "server-momentum"),
        ({"aggregation.method": "weighted", "aggregation.robust": "norm-clip"}, "robust"),
        ({"aggregation.method": "fedex", "aggregation.robust": "geometric-median"}, "robust"),
        ({"aggregation.clip-norm": 1.0}, "clip-norm"),
    ],
)
def test_aggregation_settings_that_would_do_nothing_are_refused(changes, key: str) -> None:
    with pytest.raises(ConfigError, match=f"aggregation.{key}"):
        RunConfig.parse(changes)
