"""The roster: one pinned key and size for each site."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import ConfigError
from server.roster import LiveRoster, Roster, RosterEntry

OSLO = RosterEntry("oslo", "aa" * 32, 120)
BERN = RosterEntry("bern", "bb" * 32, 80)


def test_sites_are_found_by_name_and_listed_in_order() -> None:
    roster = Roster([OSLO, BERN])
    assert list(roster) == ["bern", "oslo"]
    assert roster["oslo"] == OSLO
    assert roster.get("nobody") is None
    assert len(roster) == 2


def test_a_saved_roster_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    Roster([OSLO, BERN]).save(path)
    assert dict(Roster.load(path)) == {"bern": BERN, "oslo": OSLO}


def test_a_name_enrolled_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="names a site twice"):
        Roster([OSLO, RosterEntry("oslo", "cc" * 32, 1)])


def test_a_file_that_names_a_site_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    entry = {"site": "oslo", "public_key": "aa", "declared_size": 1}
    path.write_text(json.dumps([entry, entry]))
    with pytest.raises(ConfigError, match="names a site twice"):
        Roster.load(path)


def test_a_missing_roster_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="enrol a site first"):
        Roster.load(tmp_path / "roster.json")


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "7", '{"oslo": 1}', '["oslo"]', '[{"site": "oslo"}]', '[{"site": []}]',
     '[{"site": "oslo", "public_key": "aa", "declared_size": 1, "extra": 1}]'],
)  # fmt: skip
def test_a_malformed_roster_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "roster.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is not a roster; restore it"):
        Roster.load(path)


@pytest.mark.parametrize(
    "size",
    ["0", "-5", "1000000000001", "1e400", "NaN", "-Infinity", "12.0", "true", '"12"', "null"],
)
def test_a_declared_size_that_is_no_weight_is_refused_when_the_roster_is_read(
    tmp_path: Path, size: str
) -> None:
    """Python reads NaN, Infinity and 1e400 from JSON; a NaN weight would make a NaN of every merge."""
    path = tmp_path / "roster.json"
    path.write_text(f'[{{"site": "oslo", "public_key": "aa", "declared_size": {size}}}]')
    with pytest.raises(
        ConfigError, match=r"'oslo' with declared size .* from 1 to 1,000,000,000,000"
    ):
        Roster.load(path)


@pytest.mark.parametrize("size", [1, 10**12])
def test_the_smallest_and_the_largest_declared_size_are_weights(tmp_path: Path, size: int) -> None:
    path = tmp_path / "roster.json"
    Roster([replace(OSLO, declared_size=size)]).save(path)
    assert Roster.load(path)["oslo"].declared_size == size


def test_a_run_that_goes_sees_who_leaves_and_who_has_new_keys_but_not_who_comes(
    tmp_path: Path,
) -> None:
    path = tmp_path / "roster.json"
    live = LiveRoster(Roster([OSLO, BERN]), path)
    rome, rotated = RosterEntry("rome", "dd" * 32, 50), replace(OSLO, public_key="ee" * 32)
    Roster([OSLO, BERN]).save(path)
    assert live.current() == Roster([OSLO, BERN])
    Roster([rotated, rome]).save(path)
    assert live.current() == Roster([rotated])
    assert live.gone() == ["bern"]
    path.unlink()
    with pytest.raises(ConfigError, match="no roster at"):
        live.current()
