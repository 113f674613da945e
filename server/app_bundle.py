"""The folder that Flower makes the app bundle of.

A checkout is one. What pip installed is none: its packages lie among everybody else's, and no pyproject.toml
comes with them.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

import tomli_w

from common.config import default_table
from common.files import write_atomically
from server.launch import APP_DIR

_PACKAGES = ("server", "client", "common")
# As in the checkout's pyproject.toml; a test compares.
_FLOWER_APP = {
    "publisher": "consilium",
    "fab-include": [f"{package}/**/*.py" for package in _PACKAGES],
    "components": {"serverapp": "server.app:app", "clientapp": "client.app:app"},
}


def app_folder(home: Path, *, installed: Path = APP_DIR) -> Path:
    """Return the folder of the app: the checkout, or a copy in `home` of the packages that are installed.

    home: of Flower's own files. installed: where the packages are. A copy is made anew each time, since an
    upgrade exchanges them.
    """
    if (installed / "pyproject.toml").is_file():
        return installed
    folder = home / "app"
    shutil.rmtree(folder, ignore_errors=True)
    for package in _PACKAGES:
        shutil.copytree(installed / package, folder / package, ignore=_all_but_code)
    write_atomically(folder / "pyproject.toml", _pyproject().encode())
    return folder


def _all_but_code(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_file() and not name.endswith(".py")]


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
