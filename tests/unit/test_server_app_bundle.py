"""The app bundle is the same from a checkout and from what pip installed."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from common.config import read_toml
from server.app_bundle import app_folder

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The packages as a wheel brings them, beside somebody else's."""
    folder = tmp_path / "site-packages"
    for package in ("server", "client", "common", "simulations"):
        shutil.copytree(CHECKOUT / package, folder / package)
    (folder / "other").mkdir()
    (folder / "other" / "secret.py").write_text("x = 1\n")
    return folder


def _contents(folder: Path) -> dict[str, bytes]:
    """What the bundle of a folder holds, less what Flower writes about it."""
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder))) as bundle:
        return {name: bundle.read(name) for name in bundle.namelist() if name.endswith(".py")}


def test_a_checkout_is_its_own_folder(tmp_path: Path) -> None:
    assert app_folder(tmp_path / "home") == CHECKOUT
    assert not (tmp_path / "home").exists()


# Flower's own way to read patterns.
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_what_pip_installed_gives_the_same_bundle_as_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    made = app_folder(tmp_path / "home", installed=installed)
    assert _contents(made) == _contents(CHECKOUT)
    read, wanted = read_toml(made / "pyproject.toml"), read_toml(CHECKOUT / "pyproject.toml")
    assert read["tool"]["flwr"] == wanted["tool"]["flwr"]
    assert read["project"] == {name: wanted["project"][name] for name in read["project"]}


def test_after_an_upgrade_the_copy_is_the_new_one(installed: Path, tmp_path: Path) -> None:
    app_folder(tmp_path / "home", installed=installed)
    (installed / "server" / "screening.py").unlink()
    (installed / "server" / "app.py").write_text("app = 2\n")
    made = app_folder(tmp_path / "home", installed=installed)
    assert not (made / "server" / "screening.py").exists()
    assert (made / "server" / "app.py").read_text() == "app = 2\n"
