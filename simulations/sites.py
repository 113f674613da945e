"""Simulated hospitals: folders laid out exactly like a real hospital's, made from data one has.

A source is a folder of site folders (each with a site.toml and its data) or of JSONL files (one a
site). Sources are only read; the sites of a run stand in the run's own folder, with keys made there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from client.site_config import SITE_FILE, SiteConfig, load_site_config
from common.config import read_toml
from common.dataset import Columns, load_records
from common.errors import ConfigError
from common.files import write_atomically
from common.signing import SigningKey, load_or_generate
from server.roster import Roster, RosterEntry

DATA_SUFFIXES = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True, slots=True)
class SourceSite:
    """Where a simulated site comes from.

    data: its records. settings: the site.toml beside them as a tree, {} when there is none.
    """

    name: str
    data: Path
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BaseModelFolder:
    """The base model that a simulation's sites are given."""

    name: str
    path: Path
    digest: str


def find_sites(folder: Path) -> list[SourceSite]:
    """Return the sites of a folder, sorted by name.

    Raises ConfigError when there are none, or a site.toml names no data.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"no folder {folder}; --sites-from wants site folders or JSONL files in it"
        )
    sites = [
        _from_site_folder(path) for path in sorted(folder.iterdir()) if (path / SITE_FILE).is_file()
    ]
    if not sites:
        sites = [
            SourceSite(path.stem, path.resolve())
            for path in sorted(folder.iterdir())
            if path.suffix in DATA_SUFFIXES
        ]
    if not sites:
        raise ConfigError(
            f"{folder} holds neither site folders (with {SITE_FILE}) nor {', '.join(DATA_SUFFIXES)} "
            "files"
        )
    return sites


def prepare_sites(
    sources: Sequence[SourceSite],
    folder: Path,
    *,
    model: BaseModelFolder,
    coordinator_public_key: str,
    split: str,
) -> Roster:
    """Write one site folder for each source and return the roster of them all.

    split: the rows that count towards a size not declared. Sites already there (resume) stay.
    Raises ConfigError or DataError before anything is written for the site it names.
    """
    entries = []
    for source in sources:
        home = folder / source.name
        if not (home / SITE_FILE).exists():
            content = _site_toml(
                source, model=model, coordinator_public_key=coordinator_public_key, split=split
            )
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(home / SITE_FILE, content.encode(), mode=0o600)
        config = load_site_config(home)
        key: SigningKey = load_or_generate(config.signing_key_path)
        entries.append(RosterEntry(config.site.name, key.public_hex, config.data.declared_size))
    return Roster(entries)


def _from_site_folder(folder: Path) -> SourceSite:
    settings = read_toml(folder / SITE_FILE)
    try:
        name, path = str(settings["site"]["name"]), str(settings["data"]["path"])
    except (KeyError, TypeError):
        raise ConfigError(f"{folder / SITE_FILE} needs name in [site] and path in [data]") from None
    return SourceSite(name, (folder / path).resolve(), settings)


def _site_toml(
    source: SourceSite, *, model: BaseModelFolder, coordinator_public_key: str, split: str
) -> str:
    data = {"name": source.name, **source.settings.get("data", {}), "path": str(source.data)}
    if "declared-size" not in data:
        columns = Columns(**data.get("columns", {}))
        data["declared-size"] = len(load_records(source.data, columns=columns, split=split))
    policy = {
        # A simulation answers for nobody's records; a site.toml of its own says otherwise.
        "max-epsilon": math.inf,
        "max-delta": 0.5,
        "require-dp": False,
        "max-rank": 4096,
        "max-steps": 10**6,
        "release-metrics": ["train-loss", "train-seconds"],
        **source.settings.get("policy", {}),
        "allowed-models": [{"name": model.name, "path": str(model.path), "digest": model.digest}],
    }
    tree = {
        "site": {"name": source.name},
        "data": data,
        "policy": policy,
        "coordinator": {"public-key": coordinator_public_key},
        "device": source.settings.get("device", {"name": "auto"}),
    }
    try:
        SiteConfig.model_validate(tree)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"site {source.name!r} is not usable:\n" + "\n".join(lines)) from None
    return tomli_w.dumps(tree)
