"""The coordinator's own test records: which files, which split, and how they fall into groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.config import RunConfig
from common.dataset import Columns, load_records
from common.errors import DataError
from common.model import BaseModel
from common.prompts import Examples, Prompt, resolve_template, tokenize_all

# What a column of sites is usually called.
_SITE_COLUMN = "site"
FILE_GROUPS = "file"


@dataclass(frozen=True, slots=True)
class CentralSet:
    """Test records as text and as tokens, in one order.

    groups: each record's group, () where nothing tells them apart. group_by: the column that does, "file"
    where the files do, "" without groups.
    """

    prompts: tuple[Prompt, ...] = field(repr=False)
    examples: Examples = field(repr=False)
    groups: tuple[str, ...] = ()
    group_by: str = ""

    def __len__(self) -> int:
        return len(self.prompts)


def central_files(central_data: str, *, relative_to: Path = Path()) -> list[Path]:
    """Return the files that evaluation.central-data names: files or folders, comma-separated.

    A folder stands for its *.jsonl files. Raises DataError when one of them is missing.
    """
    parts = filter(None, (part.strip() for part in central_data.split(",")))
    try:
        return record_files([relative_to / part for part in parts])
    except DataError as error:
        raise DataError(f"evaluation.central-data: {error}") from None


def record_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files of records at these paths; a folder stands for its *.jsonl files.

    Raises DataError when one of them is missing.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            raise DataError(
                f"no records at {path}; name a file of them, or a folder of *.jsonl files"
            )
        files += found
    return files


def load_central_set(
    files: Sequence[Path], config: RunConfig, *, base: BaseModel
) -> CentralSet | None:
    """Return the test records; None when no file is given. Raises DataError.

    evaluation.group-by names the column that groups them; "" takes `site` where every record has one, else
    the files where there are several.
    """
    if not files:
        return None
    evaluation = config.evaluation
    column = evaluation.group_by or _SITE_COLUMN
    prompts: list[Prompt] = []
    groups: list[str] = []
    names: list[str] = []
    stems = [path.stem for path in files]
    for path in files:
        records = load_records(
            path,
            columns=Columns(group=column),
            split=evaluation.split,
            max_records=evaluation.max_records,
        )
        prompts += records.prompts
        groups += records.groups
        # sites/north/records.jsonl and sites/south/records.jsonl are two groups.
        alone = stems.count(path.stem) == 1
        names += [path.stem if alone else f"{path.parent.name}/{path.stem}"] * len(records)
    if evaluation.group_by and evaluation.group_by != FILE_GROUPS and not all(groups):
        raise DataError(
            f"evaluation.group-by = {column!r}, and {groups.count('')} of {len(groups)} test records have "
            'no such column; name one that all have, "file", or "" to leave it to the data'
        )
    by_file = evaluation.group_by == FILE_GROUPS or not all(groups)
    told_apart = names if by_file else groups
    group_by = FILE_GROUPS if by_file else column
    if len(set(told_apart)) < 2:
        told_apart, group_by = [], ""
    return CentralSet(
        tuple(prompts), tokenize_prompts(prompts, config, base=base), tuple(told_apart), group_by
    )


def load_central_examples(
    files: Sequence[Path], config: RunConfig, *, base: BaseModel
) -> Examples | None:
    """Return the tokenised test records alone; None when no file is given. Raises DataError."""
    central = load_central_set(files, config, base=base)
    return None if central is None else central.examples


def tokenize_prompts(
    prompts: Sequence[Prompt], config: RunConfig, *, base: BaseModel, shorter_by: int = 0
) -> Examples:
    """Return prompts as tokens of the base, by the run's template and length. Raises DataError.

    shorter_by: so many tokens fewer than data.max-length.
    """
    return tokenize_all(
        prompts,
        tokenizer=base.tokenizer,
        template=resolve_template(config.data.prompt_template),
        max_length=config.data.max_length - shorter_by,
    )
