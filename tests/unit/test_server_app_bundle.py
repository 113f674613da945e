"""The app bundle is the same from a checkout and from what pip installed."""

from __future__ import annotations

import errno
import io
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from common.config import read_toml
from common.errors import ConfigError, DiskError
from server.app_bundle import app_folder

CHECKOUT = Path(__file__).parents[2]


def _write_packages(folder: Path) -> Path:
    """The packages, beside somebody else's."""
    for package in ("server", "client", "common", "simulations"):
        shutil.copytree(CHECKOUT / package, folder / package)
    (folder / "other").mkdir()
    (folder / "other" / "secret.py").write_text("x = 1\n")
    return folder


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """As a wheel brings them."""
    return _write_packages(tmp_path / "site-packages")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As git does, and a virtual environment."""
    folder = _write_packages(tmp_path / "checkout")
    shutil.copy(CHECKOUT / "pyproject.toml", folder)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "more.py").write_text("y = 1\n")
    return folder


def _contents(folder: Path) -> dict[str, bytes]:
    """What the bundle of a folder holds, less what Flower writes about it."""
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder))) as bundle:
        return {name: bundle.read(name) for name in bundle.namelist() if name.endswith(".py")}


# Flower's own way to read patterns.
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_a_checkout_and_what_pip_installed_give_the_same_bundle(
    checkout: Path, installed: Path, tmp_path: Path
) -> None:
    wanted = _contents(checkout)
    assert {name.partition("/")[0] for name in wanted} == {"server", "client", "common"}
    assert _contents(app_folder(tmp_path / "home-1", installed=checkout)) == wanted
    assert _contents(app_folder(tmp_path / "home-2", installed=installed)) == wanted


def test_the_app_is_described_as_in_the_checkout(installed: Path, tmp_path: Path) -> None:
    made = app_folder(tmp_path / "home", installed=installed)
    read, wanted = read_toml(made / "pyproject.toml"), read_toml(CHECKOUT / "pyproject.toml")
    assert read["tool"]["flwr"] == wanted["tool"]["flwr"]
    assert read["project"] == {name: wanted["project"][name] for name in read["project"]}


def test_flower_walks_nothing_but_the_code(checkout: Path, tmp_path: Path) -> None:
    made = app_folder(tmp_path / "home", installed=checkout)
    assert sorted(path.name for path in made.iterdir()) == [
        "client", "common", "pyproject.toml", "server",
    ]  # fmt: skip
    assert {path.suffix for path in made.rglob("*") if path.is_file()} == {".py", ".toml"}
    described = (made / "pyproject.toml").read_bytes()
    assert described == (checkout / "pyproject.toml").read_bytes()


def test_a_copy_that_is_the_same_is_left_as_it_is(installed: Path, tmp_path: Path) -> None:
    """So that a full disk keeps no coordinator from starting again."""
    made = app_folder(tmp_path / "home", installed=installed)
    os.utime(made / "server" / "app.py", (1, 1))
    assert app_folder(tmp_path / "home", installed=installed) == made
    assert (made / "server" / "app.py").stat().st_mtime == 1


def test_after_an_upgrade_the_copy_is_the_new_one(installed: Path, tmp_path: Path) -> None:
    app_folder(tmp_path / "home", installed=installed)
    (installed / "server" / "screening.py").unlink()
    (installed / "server" / "app.py").write_text("app = 2\n")
    made = app_folder(tmp_path / "home", installed=installed)
    assert not (made / "server" / "screening.py").exists()
    assert (made / "server" / "app.py").read_text() == "app = 2\n"


def test_an_editors_lock_is_no_code(installed: Path, tmp_path: Path) -> None:
    (installed / "server" / ".#app.py").symlink_to("somebody@somewhere")
    made = app_folder(tmp_path / "home", installed=installed)
    assert (made / "server" / "app.py").is_file()
    assert not (made / "server" / ".#app.py").is_symlink()


def test_a_full_disk_is_said_and_the_copy_that_is_there_stays(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = app_folder(tmp_path / "home", installed=installed)
    (installed / "server" / "app.py").write_text("app = 2\n")

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskError, match="No space left.*mend"):
        app_folder(tmp_path / "home", installed=installed)
    assert [path.name for path in made.parent.iterdir()] == ["app"]
    assert "ServerApp" in (made / "server" / "app.py").read_text()


def test_a_place_where_nothing_can_be_written_is_refused(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(ConfigError, match="cannot be written to .*mend that, and start again"):
        app_folder(tmp_path / "home", installed=installed)
