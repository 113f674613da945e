"""The folder that Flower makes the app bundle of: a copy of the packages' code, and nothing else.

Flower walks the whole folder for each submission. What pip installed lies among everybody else's packages,
and a checkout may hold a virtual environment of 80,000 files.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import tomli_w

from common.config import default_table
from common.errors import ConfigError, DiskError
from common.files import is_disk_full
from server.launch import APP_DIR

_PACKAGES = ("server", "client", "common")
# As in the checkout's pyproject.toml; a test compares.
_FLOWER_APP = {
    "publisher": "consilium",
    "fab-include": [f"{package}/**/*.py" for package in _PACKAGES],
    "components": {"serverapp": "server.app:app", "clientapp": "client.app:app"},
}


def app_folder(home: Path, *, installed: Path = APP_DIR) -> Path:
    """Return the folder of the app: a copy in `home` of the packages that are installed.

    home: of Flower's own files. installed: where the packages are, a checkout or what pip made. A copy that
    differs is made anew, since an upgrade exchanges them; one that does not is left, since a full disk
    must not keep a coordinator from starting again. Raises DiskError on a full disk, ConfigError where the
    copy cannot be written.
    """
    folder = home / "app"
    described = installed / "pyproject.toml"
    wanted = {
        "pyproject.toml": described.read_bytes() if described.is_file() else _pyproject().encode()
    }
    for package in _PACKAGES:
        for path in (installed / package).rglob("*.py"):
            # An editor's lock is a link to nowhere.
            if path.is_file():
                wanted[path.relative_to(installed).as_posix()] = path.read_bytes()
    if wanted != _contents(folder):
        _write(folder, wanted)
    return folder


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put a folder of these files in another's place, whole or not at all."""
    new = folder.with_name(f"{folder.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        for name, content in files.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(new, folder)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        kind = DiskError if is_disk_full(error) else ConfigError
        raise kind(
            f"the code that Flower ships cannot be written to {folder} ({error.strerror}); mend that, and "
            "start again"
        ) from None


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative path; nothing of one that is not there."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _pyproject() -> str:
    """Return what Flower reads of pyproject.toml, from what pip knows of this installation."""
    known = importlib.metadata.metadata("consilium")
    project = {
        "name": known["Name"],
        "version": known["Version"],
        "description": known["Summary"],
        "license": known["License-Expression"],
    }
    content = tomli_w.dumps({"project": project, "tool": {"flwr": {"app": _FLOWER_APP}}})
    return f"{content}\n[tool.flwr.app.config]\n{default_table()}"
