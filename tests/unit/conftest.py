"""What several unit tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from common.model import BaseModel


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


@pytest.fixture(scope="module", params=["none", "nf4", "int8"])
def base(request: pytest.FixtureRequest, tiny_model_dir: Path) -> Iterator[BaseModel]:
    """The tiny Llama, quantised in each way in turn."""
    yield _load(tiny_model_dir, request.param)
    from common.model import release_base

    release_base()


@pytest.fixture(scope="module")
def plain(tiny_model_dir: Path) -> BaseModel:
    """The tiny Llama as it is."""
    return _load(tiny_model_dir, "none")


def _load(folder: Path, quantization: Any) -> BaseModel:
    # Most unit tests need no model either.
    from common.config import ModelSection
    from common.model import load_base

    section = ModelSection(quantization=quantization)
    return load_base(folder, section, device=torch.device("cpu"))
