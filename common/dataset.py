"""Records from a file: read, check, select, count. A site's own, or the coordinator's test set.

Nothing here puts a record's text into an error or a log line: messages give paths, line numbers and
counts, and records hide their text from repr().
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.prompts import Prompt

logger = logging.getLogger(__name__)

# More unusable records than this and something is wrong with the file, not with a record.
MAX_SKIPPED_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Columns:
    """What a data set calls its columns; `split` is only looked at when a split is asked for.

    patient: tells patients apart; "" where nobody asks. names: hold people's names, for `rewrite`. group: by
    which the coordinator's own records are told apart in tables; "" where nobody asks.
    """

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    split: str = "split"
    patient: str = ""
    names: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True, slots=True)
class Records:
    """Usable records, and how many were skipped for want of a question, an answer or a patient.

    patients: for each patient the places of its records in `prompts`; () unless a column tells them
    apart. Whose they are is not kept. groups: what each record's group column says, "" where it has none;
    () unless one was asked for.
    """

    prompts: tuple[Prompt, ...] = field(repr=False)
    num_skipped: int
    patients: tuple[tuple[int, ...], ...] = ()
    groups: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)


def load_records(
    path: Path,
    *,
    columns: Columns,
    split: str = "",
    split_required: bool = False,
    max_records: int = 0,
    rewrite: Callable[[str, Sequence[str]], str] | None = None,
    name: str = "",
) -> Records:
    """Return the usable records of a JSONL, CSV or Parquet file.

    split: only rows whose split column equals it; rows without that column are all used, unless
    split_required: then they are an error, since nothing tells what they are for.
    max_records: the first so many usable rows; 0 takes all.
    columns: what this data set calls its columns. rewrite: is given each record's instruction, input
    and output beside its people's names, and returns what stands in its place.
    name: what errors and log lines call the data set; its path when "", which a hospital's may not show,
    because a file's name can be a patient's.
    Raises DataError when the file is missing, empty, malformed, holds no record of the split, or
    when more than a tenth of its records have no question or no answer.
    """
    name = name or str(path)
    prompts: list[Prompt] = []
    patients: dict[str, list[int]] = {}
    groups: list[str] = []
    skipped = rows = 0
    for row in _rows(path, name):
        rows += 1
        _check_columns(row, columns.names, name)
        if split_required and columns.split not in row:
            raise DataError(
                f"a record of {name} has no column {columns.split!r}, so that records to train on and to "
                "test with cannot be told apart; add that column"
            )
        if split and columns.split in row and row[columns.split] != split:
            continue
        prompt = _prompt(row, columns)
        patient = _named(row, columns.patient) if columns.patient else ""
        if prompt is None or patient is None:
            skipped += 1
        else:
            if columns.patient:
                patients.setdefault(patient, []).append(len(prompts))
            if columns.group:
                groups.append(_named(row, columns.group) or "")
            prompts.append(
                prompt
                if rewrite is None
                else _rewritten(prompt, rewrite, _names(row, columns.names))
            )
        if max_records and len(prompts) == max_records:
            break
    if rows == 0:
        raise DataError(f"{name} is empty; give a file with at least one record")
    total = len(prompts) + skipped
    if total == 0:
        raise DataError(f"{name} has {rows} records, none of them of split {split!r}")
    if skipped > MAX_SKIPPED_SHARE * total:
        columns_needed = (columns.instruction, columns.output, columns.patient)
        needed = [column for column in columns_needed if column]
        raise DataError(
            f"{skipped} of {total} records in {name} have no {' or no '.join(map(repr, needed))}; "
            "check the column names, or remove those records"
        )
    if skipped:
        logger.warning("%s: skipped %d of %d incomplete records", name, skipped, total)
    return Records(
        tuple(prompts), skipped, tuple(map(tuple, patients.values())), groups=tuple(groups)
    )


def load_rows(path: Path) -> list[dict[str, Any]]:
    """Return every row of a data set as it stands. Raises DataError as `load_records` does."""
    rows = [dict(row) for row in _rows(path, str(path))]
    if not rows:
        raise DataError(f"{path} is empty; give a file with at least one record")
    return rows


def _prompt(row: Mapping[str, Any], columns: Columns) -> Prompt | None:
    instruction, answer = row.get(columns.instruction), row.get(columns.output)
    if not isinstance(instruction, str) or not isinstance(answer, str):
        return None
    if not instruction.strip() or not answer.strip():
        return None
    context = row.get(columns.input)
    return Prompt(instruction, context if isinstance(context, str) else "", answer)


def _rewritten(
    prompt: Prompt, rewrite: Callable[[str, Sequence[str]], str], names: Sequence[str]
) -> Prompt:
    texts = (prompt.instruction, prompt.input, prompt.output)
    return Prompt(*(rewrite(text, names) for text in texts))


def _check_columns(row: Mapping[str, Any], wanted: Sequence[str], name: str) -> None:
    """A misspelt column would leave every name where it is."""
    missing = [column for column in wanted if column not in row]
    if missing:
        raise DataError(f"a record of {name} has no {missing}; check data.name-columns")


def _names(row: Mapping[str, Any], wanted: Sequence[str]) -> tuple[str, ...]:
    return tuple(row[column] for column in wanted if isinstance(row[column], str))


def _named(row: Mapping[str, Any], column: str) -> str | None:
    """Return what a column calls a row's patient, or its group; None where there is nothing.

    A number and its text are the same name: a CSV knows only text.
    """
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return str(value).strip() or None


def _rows(path: Path, name: str) -> Iterator[Mapping[str, Any]]:
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.is_dir():
        return _saved_dataset(path, name)
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{name}: a data set ends in one of {sorted(readers)}, or is a folder written by "
            "datasets' save_to_disk"
        )
    if not path.is_file():
        raise DataError(f"no data set at {name}; correct the path")
    return reader(path, name)


def _jsonl(path: Path, name: str) -> Iterator[Mapping[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise DataError(f"{name} line {number} is not JSON; correct or remove it") from None
            if not isinstance(row, dict):
                raise DataError(f"{name} line {number} is not a JSON object")
            yield row


def _csv(path: Path, name: str) -> Iterator[Mapping[str, Any]]:
    try:
        # utf-8-sig: Excel puts a byte order mark before the first column's name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, strict=True)
    except (csv.Error, UnicodeDecodeError):
        raise DataError(f"{name} is not a UTF-8 CSV file with a header line") from None


def _saved_dataset(path: Path, name: str) -> Iterator[Mapping[str, Any]]:
    """Rows of a folder written by save_to_disk, read where it lies: no copy in anybody's cache."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError, OSError):
        raise DataError(f"{name} is not a folder written by datasets' save_to_disk") from None
    if isinstance(saved, datasets.DatasetDict):
        raise DataError(f"{name} holds several data sets {sorted(saved)}; name one of its folders")
    yield from saved


def _parquet(path: Path, name: str) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError):
        raise DataError(f"{name} is not a readable Parquet file") from None
