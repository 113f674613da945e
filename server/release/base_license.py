"""The licence of a base model, as its folder says it: a model card's metadata, else a licence file."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNKNOWN = "unknown"
# What goes along with weights that were made from a base model.
_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")
# The beginning of a licence's text -> its name on the hub.
_TEXTS = (
    (("Apache License", "Version 2.0"), "apache-2.0"),
    (("MIT License", "Permission is hereby granted"), "mit"),
    (("Permission is hereby granted, free of charge", "The above copyright notice"), "mit"),
)
_BEGINNING = 2000


@dataclass(frozen=True, slots=True)
class BaseLicense:
    """license, name: as in a model card's metadata; name is "" but for "other". source: who says so."""

    license: str
    name: str = ""
    source: str = ""

    @property
    def shown(self) -> str:
        """The licence as a person is told of it."""
        return self.name or self.license


def find_license(folder: Path, *, given: str = "") -> BaseLicense:
    """Return the licence of the base model in a folder.

    given: what a person says that it is. Where neither they nor the folder say it is UNKNOWN.
    """
    if given:
        return BaseLicense(given, source="as whoever made this release says")
    data = _card_data(folder / "README.md")
    if data.get("license"):
        name = str(data.get("license_name") or "")
        return BaseLicense(str(data["license"]), name, "as the base model's card says")
    for path in license_files(folder):
        text = path.read_text(encoding="utf-8", errors="replace")[:_BEGINNING]
        for words, license_id in _TEXTS:
            if all(word in text for word in words):
                return BaseLicense(license_id, source=f"by the text of its {path.name}")
    if license_files(folder):
        return BaseLicense("other", license_files(folder)[0].name, "a text of its own")
    return BaseLicense(UNKNOWN)


def license_files(folder: Path) -> tuple[Path, ...]:
    """Return the licence files of a base model's folder, sorted by name.

    A link counts where it leads to a file of the folder, or to the blobs of the hub's cache that it is in: a
    folder that somebody else made must not have this machine's files read and released.
    """
    real = folder.resolve()
    homes = [real]
    if real.parent.name == "snapshots":
        homes.append(real.parent.parent / "blobs")
    return tuple(
        sorted(
            path
            for path in {path for pattern in _FILES for path in folder.glob(pattern)}
            if path.is_file() and any(path.resolve().is_relative_to(home) for home in homes)
        )
    )


def copy_license_files(folder: Path, target: Path) -> None:
    """Copy them to another folder, contents alone: a hub's cache is made of links."""
    for path in license_files(folder):
        shutil.copyfile(path, target / path.name)


def _card_data(path: Path) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    malformed = importlib.import_module("yaml").YAMLError
    try:
        # A card without metadata would be warned of, and is nothing unusual.
        if not path.read_text(encoding="utf-8").lstrip("\ufeff").startswith("---"):
            return {}
        content: dict[str, Any] = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, AttributeError, malformed):
        return {}
    return content
