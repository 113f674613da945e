"""Records from files: formats, splits, limits, and errors that never quote a record."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from common.dataset import Columns, Records, load_records, load_rows
from common.errors import DataError
from common.prompts import Prompt

SECRET = "Mrs Example"
NAMES = Columns()
Rows = list[dict[str, Any]]


def _row(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {"instruction": f"q{number}", "input": "", "output": f"a{number}", **changes}


def _jsonl(path: Path, rows: Rows) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _csv(path: Path, rows: Rows, *, encoding: str = "utf-8") -> Path:
    path = path.with_suffix(".csv")
    lines = [",".join(rows[0])] + [
        ",".join('"{}"'.format(str(v or "").replace('"', '""')) for v in row.values())
        for row in rows
    ]
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def _csv_from_excel(path: Path, rows: Rows) -> Path:
    return _csv(path, rows, encoding="utf-8-sig")


def _parquet(path: Path, rows: Rows) -> Path:
    path = path.with_suffix(".parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def _folder(path: Path, rows: Rows) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


Writer = Callable[[Path, Rows], Path]
writers = pytest.mark.parametrize("write", [_jsonl, _csv, _csv_from_excel, _parquet, _folder])


def _load(path: Path, **options: Any) -> Records:
    return load_records(path, columns=NAMES, **options)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path / "data"


@writers
def test_every_format_gives_the_same_records(here: Path, write: Writer) -> None:
    rows = [
        _row(0, instruction="naïve, “quoted”\nsecond line", split="train"),
        _row(1, input="context", split="test"),
        _row(2, output=" ", split="train"),
    ] + [_row(n, split="train") for n in range(3, 20)]
    path = write(here, rows)

    records = _load(path)

    assert records.prompts[0] == Prompt("naïve, “quoted”\nsecond line", "", "a0")
    assert records.prompts[1] == Prompt("q1", "context", "a1")
    assert [prompt.output for prompt in records.prompts[2:]] == [f"a{n}" for n in range(3, 20)]
    assert (len(records), records.num_skipped) == (19, 1)
    assert len(_load(path, split="train")) == 18
    assert load_rows(path)[1] == rows[1]


def test_columns_may_have_other_names(here: Path) -> None:
    path = _jsonl(here, [{"q": "why", "ctx": "x", "a": "so", "fold": "b"}, {"q": "?", "a": "!"}])
    columns = Columns(instruction="q", input="ctx", output="a", split="fold")

    assert load_records(path, columns=columns).prompts == (
        Prompt("why", "x", "so"),
        Prompt("?", "", "!"),
    )


@writers
def test_patients_are_groups_of_records_and_nobody_keeps_whose(here: Path, write: Writer) -> None:
    rows = [_row(n, who=f"p{n % 2}", split="") for n in range(11)]
    path = write(here, [*rows[:1], _row(9, output=" ", who="p0", split=""), *rows[1:]])
    columns = Columns("instruction", "input", "output", "split", patient="who")

    records = load_records(path, columns=columns)

    assert records.patients == ((0, 2, 4, 6, 8, 10), (1, 3, 5, 7, 9))
    assert "p0" not in repr(records)
    assert _load(path).patients == ()


def test_a_number_and_its_text_are_one_patient_and_nothing_is_none(here: Path) -> None:
    ids = [7, "7", " 7 ", "", None, 7.5, True] + [8] * 40
    path = _jsonl(here, [_row(n, who=value) for n, value in enumerate(ids)])
    records = load_records(path, columns=Columns(patient="who"))
    assert [len(patient) for patient in records.patients] == [3, 40]
    assert records.num_skipped == 4


def test_records_without_a_patient_are_as_unusable_as_those_without_an_answer(here: Path) -> None:
    path = _jsonl(here, [_row(0, who="a"), _row(1)])
    with pytest.raises(DataError, match=r"1 of 2 records .* or no 'who'; check the column"):
        load_records(path, columns=Columns(patient="who"))


def test_records_are_rewritten_as_they_are_read(here: Path) -> None:
    path = _jsonl(here, [_row(0, input="of Ada")])
    records = load_records(path, columns=Columns(), rewrite=lambda text, names: f"<{text}>")
    assert records.prompts == (Prompt("<q0>", "<of Ada>", "<a0>"),)


def test_only_the_split_that_is_asked_for_is_used(here: Path) -> None:
    path = _jsonl(here, [_row(0, split="train"), _row(1, split="test"), _row(2)])

    def outputs(split: str) -> list[str]:
        return [prompt.output for prompt in _load(path, split=split).prompts]

    # A row without the column belongs to every split.
    assert outputs("train") == ["a0", "a2"]
    assert outputs("test") == ["a1", "a2"]
    assert outputs("") == ["a0", "a1", "a2"]


def test_split_without_records_is_refused(here: Path) -> None:
    path = _jsonl(here, [_row(0, split="train"), _row(1, split="train")])

    with pytest.raises(DataError, match="has 2 records, none of them of split 'test'"):
        _load(path, split="test")


def test_first_usable_records_are_taken_up_to_the_limit(here: Path) -> None:
    path = _jsonl(here, [_row(n, split="test" if n % 2 else "train") for n in range(8)])

    records = _load(path, split="test", max_records=2)

    assert [prompt.output for prompt in records.prompts] == ["a1", "a3"]
    assert len(_load(path, max_records=0)) == 8
    assert len(_load(path, max_records=99)) == 8


UNUSABLE: dict[str, dict[str, Any]] = {
    "no answer": {"output": ""},
    "blank answer": {"output": " \n"},
    "blank question": {"instruction": "\t"},
    "null answer": {"output": None},
    "number as answer": {"output": 7},
    "list as question": {"instruction": ["q"]},
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_record_without_question_or_answer_is_skipped_and_counted(
    here: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = _jsonl(here, [_row(n) for n in range(9)] + [_row(9, input=SECRET, **UNUSABLE[name])])

    with caplog.at_level(logging.WARNING, "common.dataset"):
        records = _load(path)

    assert (len(records), records.num_skipped) == (9, 1)
    assert "skipped 1 of 10 incomplete records" in caplog.text
    assert SECRET not in caplog.text


def test_more_than_a_tenth_of_unusable_records_is_refused(here: Path) -> None:
    rows = [_row(n) for n in range(17)] + [_row(output="") for _ in range(2)]

    with pytest.raises(DataError, match="2 of 19 records .* no 'instruction' or no 'output'"):
        _load(_jsonl(here, rows))

    assert _load(_jsonl(here, [_row(18), *rows])).num_skipped == 2


def test_skipped_share_is_that_of_the_split(here: Path) -> None:
    rows = [_row(n, split="train") for n in range(30)] + [_row(output="", split="test")]
    path = _jsonl(here, rows)

    assert _load(path, split="train").num_skipped == 0
    with pytest.raises(DataError, match="1 of 1 records"):
        _load(path, split="test")


def test_wrong_column_names_are_what_the_error_suggests(here: Path) -> None:
    with pytest.raises(DataError, match="2 of 2 records .* check the column names"):
        _load(_jsonl(here, [{"q": "why", "a": "so"}] * 2))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
@pytest.mark.parametrize("load", [_load, load_rows])
def test_empty_file_is_refused(here: Path, content: bytes, load: Callable[[Path], object]) -> None:
    path = here.with_suffix(".jsonl")
    path.write_bytes(content)

    with pytest.raises(DataError, match=r"data.jsonl is empty"):
        load(path)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"instruction": "%s", ' % SECRET.encode(), "line 3 is not JSON"),
        (b"%s" % SECRET.encode(), "line 3 is not JSON"),
        (b'{"instruction": "\xff%s"}' % SECRET.encode(), "line 3 is not JSON"),
        (b"[" * 100_000, "line 3 is not JSON"),
        (b'["%s"]' % SECRET.encode(), "line 3 is not a JSON object"),
    ],
    ids=["cut", "text", "encoding", "deep", "list"],
)
def test_malformed_line_is_given_by_number_and_never_quoted(
    here: Path, line: bytes, why: str
) -> None:
    path = here.with_suffix(".jsonl")
    path.write_bytes(json.dumps(_row()).encode() + b"\n\n" + line + b"\n")

    with pytest.raises(DataError, match=why) as caught:
        _load(path)

    assert SECRET not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("suffix", "content", "why"),
    [
        (".csv", f'instruction,output\n"{SECRET}" x,a\n'.encode(), "not a UTF-8 CSV file"),
        (".csv", b"instruction,output\nn\xe4,a\n", "not a UTF-8 CSV file"),
        (".parquet", SECRET.encode() * 20, "not a readable Parquet file"),
        (".parquet", b"PAR1" + SECRET.encode() * 20 + b"\x08\0\0\0PAR1", "not a readable Parquet"),
    ],
)
def test_malformed_csv_and_parquet_are_refused_without_a_word_of_them(
    here: Path, suffix: str, content: bytes, why: str
) -> None:
    path = here.with_suffix(suffix)
    path.write_bytes(content)

    with pytest.raises(DataError, match=why) as caught:
        _load(path)

    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__


def test_missing_file_and_unknown_format_are_refused(here: Path) -> None:
    with pytest.raises(DataError, match=r"no data set at .*data.jsonl; correct the path"):
        _load(here.with_suffix(".jsonl"))
    with pytest.raises(DataError, match=r"ends in one of \['.csv', '.jsonl', '.parquet'\]"):
        _load(here.with_suffix(".xlsx"))


def test_folder_that_is_no_saved_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(SECRET)

    with pytest.raises(DataError, match="not a folder written by datasets' save_to_disk"):
        _load(tmp_path)


def test_folder_of_several_data_sets_is_refused_by_name(here: Path) -> None:
    one = datasets.Dataset.from_list([_row()])
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(here))

    with pytest.raises(DataError, match=r"several data sets \['test', 'train'\]; name one"):
        _load(here)
    assert len(_load(here / "train")) == 1


def test_records_hide_their_text_from_repr(here: Path) -> None:
    records = _load(_jsonl(here, [_row(instruction=SECRET)]))

    assert SECRET not in repr(records)
    assert "num_skipped=0" in repr(records)


def test_rewrite_is_given_the_names_in_the_records_own_columns(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"instruction": "i", "output": "o", "who": "Quxley", "by": null}\n')
    given: list[object] = []

    load_records(
        path,
        columns=Columns(names=("who", "by")),
        rewrite=lambda text, names: str(given.append(names) or text),
    )

    assert given == [("Quxley",)] * 3


def test_a_record_without_a_column_of_names_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"instruction": "i", "output": "o"}\n')

    with pytest.raises(DataError, match=r"no \['who'\]; check data.name-columns"):
        load_records(path, columns=Columns(names=("who",)))
