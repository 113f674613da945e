"""Scenarios: synthetic hospitals, or one's own data cut into sites, ready to run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from common.config import RunConfig, load_run_config
from common.dataset import Columns, load_records
from common.errors import ConfigError, DataError
from simulations.scenario import OwnData, write_own_scenario, write_synthetic_scenario
from simulations.sites import declared_size, find_sites, site_records
from simulations.synthetic import SyntheticSpec

WARDS = ("heart", "heart", "lung", "skin")


def _write_data(path: Path, count: int = 40, **more: str) -> list[dict[str, Any]]:
    rows = [
        {
            "instruction": f"Question {n}?",
            "input": "",
            "output": f"Answer {n}.",
            "ward": WARDS[n % 4],
            **more,
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _cut(folder: Path, **options: Any) -> dict[str, list[dict[str, Any]]]:
    own = OwnData(folder / "own.jsonl", **options)
    write_own_scenario(folder / "scenario", own, RunConfig())
    return {
        home.name: _read(home / "records.jsonl")
        for home in sorted((folder / "scenario" / "sites").iterdir())
    }


def _everything_once(rows: list[dict[str, Any]], folder: Path) -> bool:
    central = _read(folder / "scenario" / "central.jsonl")
    parts = [_read(path) for path in (folder / "scenario" / "sites").glob("*/records.jsonl")]
    found = [row["output"] for part in [central, *parts] for row in part]
    return sorted(found) == sorted(row["output"] for row in rows)


def test_synthetic_scenario_is_ready_to_run(tmp_path: Path) -> None:
    spec = SyntheticSpec(num_sites=3, patients_per_site=4, test_records=8)
    written = write_synthetic_scenario(tmp_path / "new" / "it", spec, RunConfig())
    assert [path.name for path in written] == ["run.toml", "sites", "central.jsonl"]
    config = load_run_config(written[0])
    assert config.federation.min_sites == 3
    assert config.evaluation.central_data == "central.jsonl"
    assert config.run.uid == ""
    assert len(_read(written[2])) == 8
    for source in find_sites(written[1]):
        assert declared_size(source, config=config) == len(_read(source.data))
        patients = config.replace({"privacy.unit": "patient"})
        assert declared_size(source, config=patients) == 4


def test_each_site_holds_back_whole_patients_for_its_own_test_split(tmp_path: Path) -> None:
    spec = SyntheticSpec(num_sites=2, patients_per_site=10, test_records=8)
    written = write_synthetic_scenario(tmp_path / "new", spec, RunConfig(), site_test_share=0.2)
    assert load_run_config(written[0]).evaluation.at_sites
    for source in find_sites(written[1]):
        rows = _read(source.data)
        patients = {
            split: {row["patient"] for row in rows if row["split"] == split}
            for split in ("train", "test")
        }
        assert (len(patients["test"]), len(patients["train"])) == (2, 8)
        assert not patients["test"] & patients["train"]


def test_own_data_is_held_back_at_its_sites_too(tmp_path: Path) -> None:
    # 36 records after the central ones, 18 a site: a third of them is 6.
    rows = _write_data(tmp_path / "own.jsonl", split="train")
    cut = _cut(tmp_path, num_sites=2, site_test_share=1 / 3)
    assert [[row["split"] for row in part].count("test") for part in cut.values()] == [6, 6]
    assert _everything_once(rows, tmp_path)
    for source in find_sites(tmp_path / "scenario" / "sites"):
        assert len(site_records(source, config=RunConfig())) == 12


@pytest.mark.parametrize("share", [1e-9, 1.0, -0.5])
def test_a_share_that_leaves_nobody_on_a_side_is_refused_and_writes_nothing(
    tmp_path: Path, share: float
) -> None:
    spec = SyntheticSpec(num_sites=2, patients_per_site=10, test_records=8)
    with pytest.raises(ConfigError, match=r"--site-test-share: a share of .* of 10 is"):
        write_synthetic_scenario(tmp_path / "new", spec, RunConfig(), site_test_share=share)
    assert not (tmp_path / "new").exists()


def test_same_seed_writes_the_same_scenario(tmp_path: Path) -> None:
    spec = SyntheticSpec(num_sites=2, patients_per_site=3, test_records=4, seed=5)
    for name in ("a", "b"):
        write_synthetic_scenario(tmp_path / name, spec, RunConfig(), site_test_share=0.4)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")]
    assert len(files) > 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_iid_cut_gives_equal_sites_and_loses_nothing(tmp_path: Path) -> None:
    rows = _write_data(tmp_path / "own.jsonl")
    sites = _cut(tmp_path, num_sites=3)
    assert {name: len(part) for name, part in sites.items()} == {
        "site-01": 12,
        "site-02": 12,
        "site-03": 12,
    }
    assert len(_read(tmp_path / "scenario" / "central.jsonl")) == 4
    assert _everything_once(rows, tmp_path)


def test_dirichlet_cut_skews_the_column(tmp_path: Path) -> None:
    rows = _write_data(tmp_path / "own.jsonl", 200)
    sites = _cut(tmp_path, partition="dirichlet", column="ward", concentration=0.05, num_sites=3)
    assert _everything_once(rows, tmp_path)
    largest = [
        max(Counter(r["ward"] for r in part).values()) / len(part) for part in sites.values()
    ]
    # Half of all records are of the heart ward; a site of one ward has a share of 1.
    assert max(largest) > 0.8


def test_column_cut_makes_a_site_of_each_value(tmp_path: Path) -> None:
    rows = _write_data(tmp_path / "own.jsonl")
    sites = _cut(tmp_path, partition="column", column="ward")
    assert set(sites) == {"heart", "lung", "skin"}
    assert {row["ward"] for row in sites["lung"]} == {"lung"}
    assert _everything_once(rows, tmp_path)
    assert load_run_config(tmp_path / "scenario" / "run.toml").federation.min_sites == 3


def test_csv_is_cut_as_well(tmp_path: Path) -> None:
    lines = [f"Question {n}?,Answer {n}." for n in range(20)]
    (tmp_path / "own.csv").write_text("\n".join(["instruction,output", *lines]) + "\n")
    own = OwnData(tmp_path / "own.csv", num_sites=2)
    write_own_scenario(tmp_path / "scenario", own, RunConfig())
    assert [len(_read(s.data)) for s in find_sites(tmp_path / "scenario" / "sites")] == [9, 9]


def test_split_that_the_data_came_with_hides_no_record_from_the_new_cut(tmp_path: Path) -> None:
    _write_data(tmp_path / "own.jsonl", split="train")
    _cut(tmp_path, num_sites=2)
    central = tmp_path / "scenario" / "central.jsonl"
    assert len(load_records(central, columns=Columns(), split="test")) == 4
    for source in find_sites(tmp_path / "scenario" / "sites"):
        assert len(site_records(source, config=RunConfig())) == 18


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "column", "column": "clinic"}, "'clinic' is missing in 36 of 36 records"),
        ({"num_sites": 37}, "cannot give 37 sites"),
        ({"test_share": 0.0}, "test share of 0.0 of 40 records is 0"),
        ({"test_share": 1.0}, "leaves records on both sides"),
        ({"partition": "dirichlet", "column": "ward", "concentration": 0.0}, "concentration"),
    ],
)
def test_impossible_cut_is_refused_and_writes_nothing(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _write_data(tmp_path / "own.jsonl")
    with pytest.raises(ConfigError, match=message):
        _cut(tmp_path, **options)
    assert not (tmp_path / "scenario").exists()


def test_missing_data_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set at"):
        _cut(tmp_path)
    assert not (tmp_path / "scenario").exists()


def test_values_that_give_one_site_name_are_refused_rather_than_lost(tmp_path: Path) -> None:
    rows = _write_data(tmp_path / "own.jsonl")
    for number, row in enumerate(rows):
        row["ward"] = ("north wing", "north/wing")[number % 2]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ConfigError, match="two values of the column give the site name 'north-wing'"
    ):
        _cut(tmp_path, partition="column", column="ward")


def test_value_without_a_letter_gives_no_site_name(tmp_path: Path) -> None:
    rows = _write_data(tmp_path / "own.jsonl")
    rows[3]["ward"] = "???"
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=r"'\?\?\?' gives no site name"):
        _cut(tmp_path, partition="column", column="ward")


def test_scenario_that_is_there_is_never_overwritten(tmp_path: Path) -> None:
    spec = SyntheticSpec(num_sites=1, patients_per_site=2, test_records=4)
    write_synthetic_scenario(tmp_path / "scenario", spec, RunConfig())
    before = (tmp_path / "scenario" / "central.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"already holds run.toml, sites, central.jsonl"):
        write_synthetic_scenario(tmp_path / "scenario", spec, RunConfig())
    _write_data(tmp_path / "own.jsonl")
    with pytest.raises(ConfigError, match="already holds"):
        _cut(tmp_path)
    assert (tmp_path / "scenario" / "central.jsonl").read_bytes() == before


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_scenario_in_the_place_of_a_file_is_refused_in_words(tmp_path: Path, below: str) -> None:
    (tmp_path / "scenario").write_text("mine")
    _write_data(tmp_path / "own.jsonl")
    spec = SyntheticSpec(num_sites=1, patients_per_site=2, test_records=4)
    with pytest.raises(ConfigError, match="scenario.* cannot be made a folder .*; choose another"):
        write_synthetic_scenario(tmp_path / "scenario" / below, spec, RunConfig())
    with pytest.raises(ConfigError, match="scenario.* cannot be made a folder .*; choose another"):
        write_own_scenario(
            tmp_path / "scenario" / below, OwnData(tmp_path / "own.jsonl"), RunConfig()
        )


def test_sites_of_a_scenario_hold_ranks_by_turns(tmp_path: Path) -> None:
    spec = SyntheticSpec(num_sites=3, patients_per_site=4, test_records=8)
    write_synthetic_scenario(tmp_path / "mixed", spec, RunConfig(), ranks=(2, 8))
    found = [
        site.settings["policy"]["max-rank"] for site in find_sites(tmp_path / "mixed" / "sites")
    ]
    assert sorted(found) == [2, 2, 8]
    write_synthetic_scenario(tmp_path / "any", spec, RunConfig())
    assert all("policy" not in site.settings for site in find_sites(tmp_path / "any" / "sites"))
