"""Simulated sites: found in a folder, written as a hospital's own, with what their site.toml says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from client.site_config import load_site_config
from common.config import RunConfig
from common.errors import ConfigError, DataError
from server.run_check import BaseModelFolder
from simulations.sites import (
    SourceSite,
    find_sites,
    plan_sites,
    with_patients,
    write_sites,
)

MODEL = BaseModelFolder("tiny", Path("/models/tiny"), "ab" * 32)
KEY = "cd" * 32


def _write_records(path: Path, count: int, **columns: str) -> Path:
    names = {"instruction": "instruction", "output": "output", **columns}
    row = {names["instruction"]: "Which test?", names["output"]: "An echo scan."}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(count)))
    return path


def _write_site(folder: Path, name: str, **sections: Any) -> Path:
    home = folder / name
    _write_records(home / "records.jsonl", 5)
    data = {"path": "records.jsonl", **sections.pop("data", {})}
    (home / "site.toml").write_text(
        tomli_w.dumps({"site": {"name": name}, "data": data, **sections})
    )
    return home


def _plan(sources: list[SourceSite], unit: str = "record") -> dict[str, str]:
    config = RunConfig.parse({"privacy.unit": unit})
    return plan_sites(sources, model=MODEL, coordinator_public_key=KEY, config=config)


def test_site_folders_are_found_by_their_site_toml(tmp_path: Path) -> None:
    _write_site(tmp_path, "south")
    _write_site(tmp_path, "north")
    (tmp_path / "notes").mkdir()
    found = find_sites(tmp_path)
    assert [site.name for site in found] == ["north", "south"]
    assert found[0].data == (tmp_path / "north" / "records.jsonl").resolve()


def test_data_files_are_sites_named_after_them(tmp_path: Path) -> None:
    _write_records(tmp_path / "b.jsonl", 2)
    (tmp_path / "a.csv").write_text("instruction,output\nWhich test?,An echo scan.\n")
    (tmp_path / "readme.md").write_text("no data")
    assert [site.name for site in find_sites(tmp_path)] == ["a", "b"]


def test_folder_without_sites_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds neither site folders"):
        find_sites(tmp_path)
    with pytest.raises(ConfigError, match="no folder"):
        find_sites(tmp_path / "none")


def test_site_toml_without_name_or_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "north").mkdir()
    (tmp_path / "north" / "site.toml").write_text("[site]\n")
    with pytest.raises(ConfigError, match=r"needs name in \[site\] and path in \[data\]"):
        find_sites(tmp_path)


def test_size_is_counted_where_none_is_declared(tmp_path: Path) -> None:
    _write_records(tmp_path / "north.jsonl", 7)
    roster = write_sites(_plan(find_sites(tmp_path)), tmp_path / "out")
    assert roster["north"].declared_size == 7
    config = load_site_config(tmp_path / "out" / "north")
    assert config.policy.max_epsilon == math.inf
    assert not config.policy.require_dp
    assert config.coordinator.public_key == KEY
    assert config.models == {"tiny": Path("/models/tiny")}


def test_declared_size_columns_and_policy_of_the_source_stand(tmp_path: Path) -> None:
    home = _write_site(
        tmp_path / "in",
        "north",
        data={
            "name": "icu-notes",
            "declared-size": 100,
            "columns": {"instruction": "question", "output": "answer"},
        },
        policy={"max-epsilon": 2.0, "require-dp": True},
    )
    _write_records(home / "records.jsonl", 5, instruction="question", output="answer")
    roster = write_sites(_plan(find_sites(tmp_path / "in")), tmp_path / "out")
    config = load_site_config(tmp_path / "out" / "north")
    assert roster["north"].declared_size == config.data.declared_size == 100
    assert config.data.name == "icu-notes"
    assert config.data.columns.instruction == "question"
    assert (config.policy.max_epsilon, config.policy.require_dp) == (2.0, True)


def test_counted_size_uses_the_sources_own_column_names(tmp_path: Path) -> None:
    columns = {"instruction": "question", "output": "answer"}
    home = _write_site(tmp_path / "in", "north", data={"columns": columns})
    _write_records(home / "records.jsonl", 4, **columns)
    roster = write_sites(_plan(find_sites(tmp_path / "in")), tmp_path / "out")
    assert roster["north"].declared_size == 4


def test_patients_are_the_units_of_a_run_that_asks_for_them(tmp_path: Path) -> None:
    path = tmp_path / "in" / "north.jsonl"
    path.parent.mkdir()
    rows = [{"instruction": "Which?", "output": "This.", "who": n // 3} for n in range(7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = with_patients(find_sites(tmp_path / "in"), column="who")

    roster = write_sites(_plan(sources, unit="patient"), tmp_path / "out")

    data = load_site_config(tmp_path / "out" / "north").data
    assert (data.unit, data.patient_id) == ("patient", "who")
    assert roster["north"].declared_size == data.declared_size == 3
    again = write_sites(_plan(sources), tmp_path / "records")
    assert again["north"].declared_size == 7
    assert load_site_config(tmp_path / "records" / "north").data.unit == "record"


def test_patients_that_nothing_tells_apart_are_refused_with_the_remedy(tmp_path: Path) -> None:
    _write_records(tmp_path / "north.jsonl", 2)
    with pytest.raises(ConfigError, match="'north' does not say which column .* --patient-id"):
        _plan(find_sites(tmp_path), unit="patient")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"policy": {"max-epsilom": 1.0}}, "policy.max-epsilom"),
        ({"data": {"columns": {"answer": "text"}}}, "data.columns.answer"),
        ({"data": {"declared-size": 0}}, "data.declared-size"),
    ],
)
def test_unusable_site_toml_is_refused_by_key(
    sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _write_site(tmp_path, "north", **sections)
    with pytest.raises(ConfigError, match=rf"site 'north' is not usable:\n  {message}"):
        _plan(find_sites(tmp_path))


def test_name_that_is_no_site_name_is_refused(tmp_path: Path) -> None:
    _write_records(tmp_path / "north wing.jsonl", 2)
    with pytest.raises(ConfigError, match=r"'north wing' is not usable:\n  site.name"):
        _plan(find_sites(tmp_path))


def test_two_sites_of_one_name_are_refused(tmp_path: Path) -> None:
    path = _write_records(tmp_path / "north.jsonl", 2)
    with pytest.raises(ConfigError, match="two sites have the same name"):
        _plan([SourceSite("north", path), SourceSite("north", path)])


def test_data_that_cannot_be_counted_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "north.jsonl").write_text("")
    with pytest.raises(DataError, match="is empty"):
        _plan(find_sites(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["north.jsonl"]


def test_sites_that_are_there_keep_their_keys_and_settings(tmp_path: Path) -> None:
    _write_records(tmp_path / "north.jsonl", 3)
    before = write_sites(_plan(find_sites(tmp_path)), tmp_path / "out")
    _write_records(tmp_path / "north.jsonl", 9)
    after = write_sites(_plan(find_sites(tmp_path)), tmp_path / "out")
    assert dict(after) == dict(before)
    assert after["north"].declared_size == 3
