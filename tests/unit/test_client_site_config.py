"""site.toml: without a policy there is no site, and every bad key is named at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from client.site_config import SiteConfig, load_site_config
from common.errors import ConfigError

DIGEST = "ab" * 32


def _tree(**sections: Any) -> dict[str, Any]:
    tree = {
        "site": {"name": "north"},
        "data": {"name": "notes", "path": "records.jsonl", "declared-size": 100},
        "policy": {
            "max-epsilon": 8.0,
            "allowed-models": [{"name": "tiny", "path": "models/tiny", "digest": DIGEST}],
        },
        "coordinator": {"public-key": "0" * 64},
    }
    return {
        name: {**tree.get(name, {}), **content} for name, content in {**tree, **sections}.items()
    }


def _load(folder: Path, tree: dict[str, Any]) -> SiteConfig:
    (folder / "site.toml").write_text(tomli_w.dumps(tree))
    return load_site_config(folder)


def test_a_small_site_toml_is_enough_and_its_policy_is_strict(tmp_path: Path) -> None:
    site = _load(tmp_path, _tree())

    assert site.policy.require_dp
    assert site.policy.release_metrics == ()
    assert site.data.unit == "record"
    assert site.data_path == tmp_path.resolve() / "records.jsonl"
    assert site.models == {"tiny": tmp_path.resolve() / "models/tiny"}
    assert site.coordinator.public_keys == ("0" * 64,)


@pytest.mark.parametrize("missing", ["site", "data", "policy", "coordinator"])
def test_without_a_section_there_is_no_site(tmp_path: Path, missing: str) -> None:
    tree = _tree()
    del tree[missing]

    with pytest.raises(
        ConfigError, match=rf"site.toml is not usable:\n  {missing}: Field required"
    ):
        _load(tmp_path, tree)


@pytest.mark.parametrize("missing", ["max-epsilon", "allowed-models"])
def test_a_policy_must_say_how_much_and_which_models(tmp_path: Path, missing: str) -> None:
    tree = _tree()
    del tree["policy"][missing]

    with pytest.raises(ConfigError, match=rf"policy\.{missing}: Field required"):
        _load(tmp_path, tree)


def test_every_bad_key_is_named_at_once(tmp_path: Path) -> None:
    tree = _tree(
        data={"unit": "patients", "declared-size": 0},
        policy={"max-epsilom": 3.0, "approval": "maybe", "max-rank": "high", "metric-digits": 0},
        coordinator={"public-key": "not a key"},
    )

    with pytest.raises(ConfigError, match="is not usable") as caught:
        _load(tmp_path, tree)
    for key in (
        "data.declared-size", "data.unit", "policy.max-epsilom", "policy.approval",
        "policy.max-rank", "policy.metric-digits", "coordinator.public-key",
    ):  # fmt: skip
        assert f"  {key}" in str(caught.value)


@pytest.mark.parametrize(
    "key", ["max-epsilon", "max-delta", "max-grad-norm", "max-hours", "max-adapter-norm"]
)
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_cap_is_a_number_above_zero(tmp_path: Path, key: str, value: float) -> None:
    """No comparison with NaN is true: as a cap it would allow everything."""
    with pytest.raises(ConfigError, match=rf"policy\.{key}"):
        _load(tmp_path, _tree(policy={key: value}))


def test_an_infinite_cap_on_epsilon_is_a_choice(tmp_path: Path) -> None:
    site = _load(tmp_path, _tree(policy={"max-epsilon": math.inf}))

    assert math.isinf(site.policy.max_epsilon)


def test_patients_need_a_column_that_tells_them_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data: .*needs patient-id"):
        _load(tmp_path, _tree(data={"unit": "patient"}))

    site = _load(tmp_path, _tree(data={"unit": "patient", "patient-id": "patient"}))
    assert site.data.unit == "patient"


def test_several_coordinators_may_be_believed_but_not_none(tmp_path: Path) -> None:
    keys = ["0" * 64, "1" * 64]

    assert _load(
        tmp_path, _tree(coordinator={"public-key": keys})
    ).coordinator.public_keys == tuple(keys)
    with pytest.raises(ConfigError, match=r"coordinator: .*public-key is an empty list"):
        _load(tmp_path, _tree(coordinator={"public-key": []}))


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    """One of them would be trained under the other's digest."""
    models = [
        {"name": "tiny", "path": "a", "digest": DIGEST},
        {"name": "tiny", "path": "b", "digest": "cd" * 32},
    ]

    with pytest.raises(ConfigError, match=r"policy: .*the same name"):
        _load(tmp_path, _tree(policy={"allowed-models": models}))


@pytest.mark.parametrize("name", ["../north", "", "a b", "north\n"])
def test_a_sites_name_is_one_word(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"site\.name"):
        _load(tmp_path, _tree(site={"name": name}))


def test_a_folder_without_site_toml_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no site.toml in .*; give the hospital's folder.*--site"
    ):
        load_site_config(tmp_path)
