"""The exception tree: as drawn, with one code each."""

from __future__ import annotations

import re

import pytest

from common import errors
from common.errors import ConsiliumError, ScreeningError

ALL = [
    item
    for item in vars(errors).values()
    if isinstance(item, type) and issubclass(item, ConsiliumError)
]


def test_drawn_tree_is_the_real_one() -> None:
    assert errors.__doc__ is not None
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__)

    assert drawn == [kind.__name__ for kind in ALL if kind is not ConsiliumError]
    assert all(kind.__bases__ == (ConsiliumError,) for kind in ALL if kind is not ConsiliumError)


def test_codes_are_unique_single_words() -> None:
    codes = [kind.code for kind in ALL]

    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch("[a-z]+", code) for code in codes)


def test_documented_exit_codes_differ_from_success_and_from_each_other() -> None:
    special = {kind.__name__: kind.exit_code for kind in ALL if kind.exit_code != 1}

    assert special == {
        "ConfigError": 2,
        "QuorumError": 3,
        "CheckpointError": 4,
        "EngineError": 5,
        "AuditError": 6,
        "DiskError": 7,
        "PreflightError": 8,
        "ReleaseError": 9,
    }


def test_screening_error_keeps_its_reason() -> None:
    with pytest.raises(ScreeningError, match="north: norm 9 is above 1") as caught:
        raise ScreeningError("norm", "north: norm 9 is above 1")

    assert (caught.value.reason, caught.value.code) == ("norm", "screening")
