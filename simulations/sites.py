"""Simulated hospitals: folders laid out exactly like a real hospital's, made from data one has.

A source is a folder of site folders (each with a site.toml and its data) or of JSONL files (one a
site). Sources are only read; the sites of a run stand in the run's own folder, with keys made there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from client.examples import columns_of
from client.policy import evaluation_refusals
from client.site_config import SITE_FILE, SiteConfig, load_site_config
from common.config import RunConfig, read_toml
from common.dataset import Records, load_records
from common.errors import ConfigError, DataError
from common.files import write_atomically
from common.signing import load_or_generate
from server.roster import Roster, RosterEntry
from server.run_check import BaseModelFolder

DATA_SUFFIXES = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True, slots=True)
class SourceSite:
    """Where a simulated site comes from.

    data: its records. settings: the site.toml beside them as a tree, {} when there is none.
    """

    name: str
    data: Path
    settings: Mapping[str, Any] = field(default_factory=dict)


# Stands in where a site is only looked at.
_NO_MODEL = BaseModelFolder("none", Path(), "0" * 64)


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


def with_patients(sources: Sequence[SourceSite], *, column: str) -> list[SourceSite]:
    """Return sources whose patients are told apart by a column."""
    return [
        replace(
            source,
            settings={
                **source.settings,
                "data": {**source.settings.get("data", {}), "patient-id": column},
            },
        )
        for source in sources
    ]


def plan_sites(
    sources: Sequence[SourceSite],
    *,
    model: BaseModelFolder,
    coordinator_public_key: str,
    config: RunConfig,
) -> dict[str, str]:
    """Return site name -> its site.toml; nothing is written.

    config: of the run; its unit of privacy is that of a data set that declares none, and the rows of
    its split count towards a size not declared.
    Raises ConfigError for a site.toml that is not usable, DataError for data that is not.
    """
    plans = {
        source.name: _site_toml(
            source, model=model, coordinator_public_key=coordinator_public_key, config=config
        )
        for source in sources
    }
    if len(plans) != len(sources):
        raise ConfigError("two sites have the same name; every site needs a name of its own")
    return plans


def write_sites(plans: Mapping[str, str], folder: Path) -> Roster:
    """Write planned sites, each with a fresh key, and return the roster; existing ones stay."""
    entries = []
    for name, content in plans.items():
        home = folder / name
        if not (home / SITE_FILE).exists():
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(home / SITE_FILE, content.encode(), mode=0o600)
        config = load_site_config(home)
        key = load_or_generate(config.signing_key_path)
        entries.append(RosterEntry(config.site.name, key.public_hex, config.data.declared_size))
    return Roster(entries)


def _from_site_folder(folder: Path) -> SourceSite:
    settings = read_toml(folder / SITE_FILE)
    try:
        name, path = str(settings["site"]["name"]), str(settings["data"]["path"])
    except (KeyError, TypeError):
        raise ConfigError(f"{folder / SITE_FILE} needs name in [site] and path in [data]") from None
    return SourceSite(name, (folder / path).resolve(), settings)


def site_records(source: SourceSite, *, config: RunConfig) -> Records:
    """Return a site's usable records, by patient where the run asks. Raises ConfigError or DataError."""
    tree = _tree(source, model=_NO_MODEL, coordinator_public_key="0" * 64, config=config)
    data = _validate(source, tree).data
    return load_records(
        source.data,
        columns=columns_of(data, by_patient=data.unit == "patient"),
        split=config.data.split,
    )


def declared_size(source: SourceSite, *, config: RunConfig) -> int:
    """Return a site's public size in units of privacy, its count where it declares none.

    Raises as `site_records` does.
    """
    records = site_records(source, config=config)
    count = len(records.patients) or len(records)
    return int(source.settings.get("data", {}).get("declared-size", count))


def check_test_records(sources: Sequence[SourceSite], *, config: RunConfig) -> None:
    """Raise ConfigError when evaluation.at-sites would be refused by each of the sites.

    One that refuses is left out of the evaluation, as in a real federation.
    """
    refusals = {source.name: _evaluation_refusal(source, config=config) for source in sources}
    if refusals and all(refusals.values()):
        listed = "\n".join(f"  {name}: {refusal}" for name, refusal in refusals.items())
        raise ConfigError(
            "evaluation.at-sites = true, and no site would count; give their records a split of their own "
            f"(consilium simulate init --site-test-share 0.2 does), or set it to false:\n{listed}"
        )


def _evaluation_refusal(source: SourceSite, *, config: RunConfig) -> str:
    """Why a site would count no test records, "" where it would."""
    tree = _tree(source, model=_NO_MODEL, coordinator_public_key="0" * 64, config=config)
    site = _validate(source, tree)
    refusals = list(evaluation_refusals(config, site))
    if refusals:
        return "; ".join(refusals)
    by_patient = site.data.unit == "patient"
    try:
        records = load_records(
            source.data,
            columns=columns_of(site.data, by_patient=by_patient),
            split=site.data.evaluation_split,
            split_required=True,
        )
    except DataError as error:
        return str(error)
    found = len(records.patients if by_patient else records)
    fewest = site.policy.min_evaluation_records
    if found >= fewest:
        return ""
    return f"policy.min-evaluation-records = {fewest}, and its test split has {found}"


def _site_toml(
    source: SourceSite, *, model: BaseModelFolder, coordinator_public_key: str, config: RunConfig
) -> str:
    tree = _tree(source, model=model, coordinator_public_key=coordinator_public_key, config=config)
    if "declared-size" not in source.settings.get("data", {}):
        tree["data"]["declared-size"] = declared_size(source, config=config)
    _validate(source, tree)
    return tomli_w.dumps(tree)


def _tree(
    source: SourceSite, *, model: BaseModelFolder, coordinator_public_key: str, config: RunConfig
) -> dict[str, Any]:
    """A simulated site's site.toml; its declared-size is 1 where the source declares none."""
    by_patient = config.privacy.unit == "patient"
    if by_patient and not source.settings.get("data", {}).get("patient-id"):
        raise ConfigError(
            f'privacy.unit = "patient", and site {source.name!r} does not say which column tells its '
            "patients apart; give --patient-id COLUMN, or patient-id in the [data] of its site.toml"
        )
    return {
        "site": {"name": source.name},
        "data": {
            "name": source.name,
            "declared-size": 1,
            "unit": "patient" if by_patient else "record",
            **source.settings.get("data", {}),
            "path": str(source.data),
        },
        "policy": {
            # A simulation answers for nobody's records; a site.toml of its own says otherwise.
            "max-epsilon": math.inf,
            "max-delta": 0.5,
            "require-dp": False,
            "max-rank": 4096,
            "max-steps": 10**6,
            "max-grad-norm": 1e6,
            "max-tokens": 10**12,
            "max-hours": 1e4,
            "max-adapter-norm": 1e9,
            "release-metrics": ["train-loss", "train-seconds", "evaluation"],
            "min-evaluation-records": 1,
            **source.settings.get("policy", {}),
            "allowed-models": [
                {"name": model.name, "path": str(model.path), "digest": model.digest}
            ],
        },
        "coordinator": {"public-key": coordinator_public_key},
        "device": source.settings.get("device", {"name": "auto"}),
    }


def _validate(source: SourceSite, tree: Mapping[str, Any]) -> SiteConfig:
    try:
        return SiteConfig.model_validate(tree)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"site {source.name!r} is not usable:\n" + "\n".join(lines)) from None
