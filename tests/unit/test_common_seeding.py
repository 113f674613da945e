"""Seeds: the same in every process, and different for every stream."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from common.seeding import derive_seed

part = st.integers() | st.text("abc")


def test_seed_is_the_same_in_another_process() -> None:
    code = "from common.seeding import derive_seed; print(derive_seed(7, 'selection', 3))"
    found = {
        int(
            subprocess.run(
                [sys.executable, "-c", code],
                env={"PYTHONHASHSEED": hash_seed},
                capture_output=True,
                check=True,
            ).stdout
        )
        for hash_seed in ("1", "2")
    }

    assert found == {derive_seed(7, "selection", 3)}


@given(st.lists(part, max_size=4), st.lists(part, max_size=4))
def test_seeds_differ_when_parts_do(a: list[int | str], b: list[int | str]) -> None:
    assert (derive_seed(*a) == derive_seed(*b)) == (a == b)
    assert 0 <= derive_seed(*a) < 2**32


def test_number_and_its_text_are_different_parts() -> None:
    assert derive_seed(1, "2") != derive_seed("1", 2) != derive_seed(12)
    assert derive_seed("a", "b") != derive_seed("astr:b")
