"""What several unit tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Floating-point sums depend on the number of threads; tests, and what they share, run on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The folder of two simulated hospitals; read only."""
    # Most unit tests need nothing of the simulation.
    from tests.unit.scenarios import write_scenario

    return write_scenario(tmp_path_factory.mktemp("scenario") / "two", tiny_model_dir)
