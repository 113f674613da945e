"""A scenario folder to start from: run.toml, sites/, central.jsonl.

Synthetic hospitals, or one's own data set cut into sites.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import tomli_w

from client.site_config import SITE_FILE
from common.config import RunConfig, Scalar
from common.dataset import Columns, load_rows
from common.errors import ConfigError
from common.files import write_atomically
from server.run_folder import run_toml
from simulations.partition import (
    held_back,
    partition_by_column,
    partition_dirichlet,
    partition_iid,
)
from simulations.synthetic import SyntheticSpec, generate_hospitals, write_jsonl

PartitionName = Literal["iid", "dirichlet", "column"]
# Of one's own data, for the central test set: more steadies the loss, and trains on less.
TEST_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class OwnData:
    """One's own data set and how to cut it.

    column: what dirichlet and column cut by. concentration: Dirichlet's; smaller is more skewed.
    test_share: of all records, held back as the central test set. site_test_share: of each site's records,
    held back there, for evaluation.at-sites.
    """

    path: Path
    partition: PartitionName = "iid"
    num_sites: int = 4
    column: str = ""
    concentration: float = 0.5
    test_share: float = TEST_SHARE
    site_test_share: float = 0.0
    seed: int = 0


def write_synthetic_scenario(
    folder: Path,
    spec: SyntheticSpec,
    config: RunConfig,
    *,
    ranks: Sequence[int] = (),
    site_test_share: float = 0.0,
) -> list[Path]:
    """Write synthetic hospitals and a run.toml; return what was written.

    ranks: what the sites can hold at most (policy.max-rank), by turns; () says nothing of it.
    site_test_share: of each site's patients, whose records it holds back for evaluation.at-sites.
    Raises ConfigError when the folder holds a scenario already, or the share leaves nobody on a side.
    """
    _refuse_existing(folder)
    hospitals = generate_hospitals(spec)
    sites = {
        name: _with_splits(
            [asdict(record) for record in records],
            groups=[record.patient for record in records],
            share=site_test_share,
            seed=spec.seed,
        )
        for name, records in hospitals.sites.items()
    }
    _make_folder(folder)
    for (name, rows), rank in zip(sites.items(), _by_turns(ranks), strict=False):
        home = folder / "sites" / name
        home.mkdir(parents=True)
        _write_rows(home / "records.jsonl", rows)
        _write_site_toml(home, name, max_rank=rank, patient_id="patient")
    write_jsonl(hospitals.central_test, folder / "central.jsonl")
    return _finish(
        folder, config, num_sites=len(sites), column="department", at_sites=site_test_share > 0
    )


def write_own_scenario(
    folder: Path, data: OwnData, config: RunConfig, *, ranks: Sequence[int] = ()
) -> list[Path]:
    """Cut one's own data set into sites and write a run.toml; return what was written.

    ranks: as above. Raises ConfigError when the folder holds a scenario already or the cut is impossible,
    DataError when the data cannot be read.
    """
    _refuse_existing(folder)
    rows = load_rows(data.path)
    held_back = partition_iid(len(rows), num_sites=len(rows), seed=data.seed)
    num_test = round(data.test_share * len(rows))
    if not 0 < num_test < len(rows):
        raise ConfigError(
            f"a test share of {data.test_share} of {len(rows)} records is {num_test}; choose a share "
            "that leaves records on both sides"
        )
    test = {index for (index,) in held_back[:num_test]}
    rest = [_without_split(row) for index, row in enumerate(rows) if index not in test]
    sites = {
        name: _with_splits(
            [rest[index] for index in indices],
            groups=range(len(indices)),
            share=data.site_test_share,
            seed=data.seed,
        )
        for name, indices in _cut(rest, data).items()
    }
    _make_folder(folder)
    for (name, part), rank in zip(sites.items(), _by_turns(ranks), strict=False):
        home = folder / "sites" / name
        home.mkdir(parents=True)
        _write_rows(home / "records.jsonl", part)
        _write_site_toml(home, name, max_rank=rank)
    _write_rows(folder / "central.jsonl", [_without_split(rows[index]) for index in sorted(test)])
    return _finish(
        folder,
        config,
        num_sites=len(sites),
        column=data.column,
        at_sites=data.site_test_share > 0,
    )


def _with_splits(
    rows: Sequence[Mapping[str, Any]], *, groups: Sequence[Hashable], share: float, seed: int
) -> list[Mapping[str, Any]]:
    """Return a site's rows, each with its split where a share of the groups is held back; as is for 0."""
    if share == 0:
        return list(rows)
    try:
        test = held_back(groups, share=share, seed=seed)
    except ValueError as error:
        raise ConfigError(f"--site-test-share: {error}") from None
    return [
        {**row, Columns().split: "test" if index in test else "train"}
        for index, row in enumerate(rows)
    ]


def _without_split(row: Mapping[str, Any]) -> dict[str, Any]:
    """A split that the data came with is another cut than this one, and would hide records from it."""
    return {key: value for key, value in row.items() if key != Columns().split}


def _cut(rows: Sequence[Mapping[str, Any]], data: OwnData) -> dict[str, Sequence[int]]:
    try:
        if data.partition == "iid":
            parts = partition_iid(len(rows), num_sites=data.num_sites, seed=data.seed)
        else:
            missing = sum(data.column not in row for row in rows)
            if missing:
                raise ConfigError(
                    f"column {data.column!r} is missing in {missing} of {len(rows)} records; name "
                    "one that every record has with --column"
                )
            labels = [str(row[data.column]) for row in rows]
            if data.partition == "column":
                return _named(partition_by_column(labels))
            parts = partition_dirichlet(
                labels,
                num_sites=data.num_sites,
                concentration=data.concentration,
                seed=data.seed,
            )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return {f"site-{number + 1:02d}": part for number, part in enumerate(parts)}


def _named(parts: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    named: dict[str, Sequence[int]] = {}
    for value, part in parts.items():
        name = _site_name(value)
        if name in named:
            raise ConfigError(
                f"two values of the column give the site name {name!r}; make them differ in letters "
                "or digits, or cut by another column"
            )
        named[name] = part
    return named


def _site_name(text: str) -> str:
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in text).strip(
        "-._"
    )
    if not name:
        raise ConfigError(f"column value {text!r} gives no site name; cut by another column")
    return name[:64]


def _by_turns(ranks: Sequence[int]) -> Iterator[int]:
    return cycle(ranks or (0,))


def _write_site_toml(home: Path, name: str, *, max_rank: int = 0, patient_id: str = "") -> None:
    data = {"name": name, "path": "records.jsonl"}
    if patient_id:
        data["patient-id"] = patient_id
    tree: dict[str, Any] = {"site": {"name": name}, "data": data}
    if max_rank:
        tree["policy"] = {"max-rank": max_rank}
    text = (
        "# A simulated hospital. The run adds keys, the coordinator, the allowed model, and a\n"
        "# declared-size where there is none (its count of records, or of patients);\n"
        "# add a [policy] table (max-epsilon, require-dp, max-rank...) to try one out.\n"
    )
    write_atomically(home / SITE_FILE, (text + tomli_w.dumps(tree)).encode())


def _finish(
    folder: Path, config: RunConfig, *, num_sites: int, column: str, at_sites: bool
) -> list[Path]:
    changes: dict[str, Scalar] = {
        "federation.min-sites": num_sites,
        "evaluation.central-data": "central.jsonl",
        "evaluation.group-by": column,
        "evaluation.at-sites": at_sites,
    }
    flat = config.replace(changes).flat()
    del flat["run.uid"]
    write_atomically(folder / "run.toml", run_toml(flat).encode())
    return [folder / "run.toml", folder / "sites", folder / "central.jsonl"]


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    write_atomically(path, text.encode())


def _refuse_existing(folder: Path) -> None:
    taken = [name for name in ("run.toml", "sites", "central.jsonl") if (folder / name).exists()]
    if taken:
        raise ConfigError(f"{folder} already holds {', '.join(taken)}; choose another folder")


def _make_folder(folder: Path) -> None:
    """Make the scenario's folder, once there is something to write. Raises ConfigError when it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made a folder ({error.strerror}); choose another one"
        ) from None
