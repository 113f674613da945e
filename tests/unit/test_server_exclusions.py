"""Excluding a site: on disk, for a run that goes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from common.errors import ConfigError
from server.exclusions import Exclusions


def test_an_exclusion_is_seen_by_whoever_has_the_file_open(tmp_path: Path) -> None:
    run, command = (Exclusions(tmp_path / "excluded.json") for _ in range(2))
    assert run.current() == {}
    command.add("bern", why="its data set is being corrected")
    (entry,) = run.current().items()
    assert entry[0] == "bern"
    assert entry[1].why == "its data set is being corrected"
    assert abs(entry[1].at - time.time()) < 60
    command.remove("bern")
    assert run.current() == {}


def test_excluding_twice_keeps_the_first_reason(tmp_path: Path) -> None:
    exclusions = Exclusions(tmp_path / "excluded.json")
    exclusions.add("bern", why="first")
    exclusions.add("bern", why="second")
    assert exclusions.current()["bern"].why == "first"


def test_letting_in_who_was_not_out_names_who_is(tmp_path: Path) -> None:
    exclusions = Exclusions(tmp_path / "excluded.json")
    with pytest.raises(ConfigError, match="'bern' is not excluded; excluded: nobody"):
        exclusions.remove("bern")
    exclusions.add("oslo", why="x")
    with pytest.raises(ConfigError, match="excluded: oslo"):
        exclusions.remove("bern")


@pytest.mark.parametrize("content", ["", "[]", '{"bern": 1}', '{"bern": {"at": 1}}', "[" * 9])
def test_a_damaged_file_stops_the_run_rather_than_letting_everybody_in(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "excluded.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="is not a list of excluded sites; remove it"):
        Exclusions(path).current()
