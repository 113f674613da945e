"""Identifiers are planted wherever a hospital has some, and looked for wherever they must not come.

Two hospitals, 24 patients, and more than 200 names, numbers, addresses and ids: in records, patient column
and file names, and quoted by exceptions from within loader, scrubber, tokeniser and trainer. None may be
in a message, a log line or a file, but for the hospital's own records and site.toml.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import tomli_w
from flwr.app import Message
from flwr.common.serde import recorddict_to_proto

import client.examples
import client.in_process
import client.scrub
import client.training
import common.prompts
from common.config import RunConfig
from common.errors import DataError, QuorumError
from common.prompts import Example, Prompt
from common.records import open_reply
from common.signing import SigningKey
from simulations.inline import InlineGrid
from simulations.run import Simulation, run_simulation
from simulations.sites import find_sites
from tests.unit.hospital import Hospital, make_hospital
from tests.unit.scenarios import TINY

SITES = ("north", "south")
PATIENTS, VISITS = 12, 2
SETTINGS: dict[str, Any] = {
    **TINY,
    "data.max-length": 160,
    "train.rounds": 1,
    "privacy.unit": "patient",
    "privacy.max-records-per-patient": VISITS,
    "privacy.noise-multiplier": 1.0,
    "evaluation.central-data": "central.jsonl",
    "federation.max-retries": 0,
}
# What a hospital has of its own: nothing of it is looked into.
OWN = ("site.toml",)


def _person(site: str, patient: int, visit: int) -> dict[str, str]:
    key = f"{SITES.index(site)}{patient:02d}{visit}"
    return {
        "name": f"Zorba Quxley-{key}",
        # So long that it turns up in no digest, time or loss by chance.
        "mrn": f"88{key}7731550264",
        "email": f"zq.{key}@ward.example",
        "address": f"{key} Quxleyan Street",
    }


def _patient_id(site: str, patient: int) -> str:
    return f"PID-{SITES.index(site)}-{patient:03d}-QX"


def _file_name(site: str) -> str:
    return f"visits of Zanthippa Quxley, {site}.jsonl"


def _records(site: str) -> list[dict[str, str]]:
    rows = []
    for patient in range(PATIENTS):
        for visit in range(VISITS):
            who = _person(site, patient, visit)
            rows.append(
                {
                    "patient": _patient_id(site, patient),
                    "instruction": f"What of {who['name']}?",
                    "input": f"{who['name']}, MRN {who['mrn']}, {who['address']}.",
                    "output": f"Write to {who['name']} at {who['email']}.",
                }
            )
    return rows


PLANTED = frozenset(
    identifier
    for site in SITES
    for patient in range(PATIENTS)
    for identifier in (
        "Zanthippa",
        _patient_id(site, patient),
        *(text for visit in range(VISITS) for text in _person(site, patient, visit).values()),
    )
)


def _leaks(content: bytes) -> list[str]:
    """Which planted identifiers are in some bytes, as text of any case, UTF-16 or hexadecimal."""
    low = content.lower()
    return [
        text
        for text in sorted(PLANTED)
        if text.lower().encode() in low
        or text.encode("utf-16-le") in content
        or text.encode().hex().encode() in low
    ]


class Everywhere:
    """All that came out while something ran: messages, log lines of every level, terminal output."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes]] = []

    def add(self, where: str, content: bytes | str) -> None:
        self.seen.append((where, content.encode() if isinstance(content, str) else content))

    def add_message(self, direction: str, message: Message) -> None:
        self.add(f"metadata of a {direction}", repr(message.metadata.__dict__))
        if message.has_content():
            self.add(direction, recorddict_to_proto(message.content).SerializeToString())
        if message.has_error():
            self.add(f"error of a {direction}", repr(message.error.__dict__))

    def add_files(self, folder: Path, *, but: tuple[str, ...] = OWN) -> None:
        for path in sorted(folder.rglob("*")):
            self.add("the name of a file", str(path.relative_to(folder)))
            if path.is_file() and path.name not in but:
                self.add(str(path.relative_to(folder)), path.read_bytes())

    def count(self, start: str) -> int:
        return sum(where.startswith(start) for where, _ in self.seen)

    def check(self) -> None:
        leaks = [(where, found) for where, content in self.seen if (found := _leaks(content))]
        assert not leaks


@pytest.fixture
def everywhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: Any
) -> Iterator[Everywhere]:
    everywhere = Everywhere()
    deliver = InlineGrid._deliver

    def watched(grid: InlineGrid, message: Message) -> Message:
        everywhere.add_message("task", message)
        reply = deliver(grid, message)
        everywhere.add_message("reply", reply)
        return reply

    monkeypatch.setattr(InlineGrid, "_deliver", watched)
    caplog.set_level(logging.DEBUG)
    # Flower's logger hands nothing up to the root.
    logging.getLogger("flwr").addHandler(caplog.handler)
    yield everywhere
    logging.getLogger("flwr").removeHandler(caplog.handler)


@contextmanager
def _listening(
    everywhere: Everywhere, caplog: pytest.LogCaptureFixture, capfd: Any
) -> Iterator[None]:
    """Take in what is logged and printed within, also when it ends by an error."""
    capfd.readouterr()
    caplog.clear()
    try:
        yield
    finally:
        everywhere.add("the log", caplog.text)
        everywhere.add("the terminal", "".join(capfd.readouterr()))


@pytest.fixture
def simulation(tmp_path: Path, tiny_model_dir: Path) -> Simulation:
    base = tmp_path / "scenario"
    for site in SITES:
        home = base / "sites" / site
        home.mkdir(parents=True)
        lines = [json.dumps(row) + "\n" for row in _records(site)]
        (home / _file_name(site)).write_text("".join(lines))
        data = {"name": site, "path": _file_name(site), "patient-id": "patient"}
        (home / "site.toml").write_text(tomli_w.dumps({"site": {"name": site}, "data": data}))
    central = [{"instruction": "What of a cold?", "output": "Rest."}] * 4
    (base / "central.jsonl").write_text("".join(json.dumps(row) + "\n" for row in central))
    return Simulation(
        config=RunConfig.parse({**SETTINGS, "model.name": str(tiny_model_dir)}),
        sources=find_sites(base / "sites"),
        out=tmp_path / "run",
        base_dir=base,
    )


def test_two_hundred_identifiers_are_planted_and_the_search_would_find_them() -> None:
    assert len(PLANTED) > 200
    assert _leaks(json.dumps(_records("north")[0]).encode())
    assert _leaks("seen: ZORBA QUXLEY-0000".encode("utf-16-le")) == []
    assert _leaks(b"seen: zorba quxley-0000") == ["Zorba Quxley-0000"]
    assert _leaks(b"Zorba Quxley-0000".hex().encode()) == ["Zorba Quxley-0000"]


def test_a_whole_run_lets_no_identifier_out(
    simulation: Simulation,
    everywhere: Everywhere,
    caplog: pytest.LogCaptureFixture,
    capfd: Any,
) -> None:
    with _listening(everywhere, caplog, capfd):
        summary = run_simulation(simulation)

    everywhere.add_files(simulation.out)
    everywhere.check()
    assert summary["sites"] == list(SITES)
    assert summary["privacy"]["north"]["unit"] == "patient"
    # What was searched is what there is: a task and a reply of each site, log, ledgers, manifests.
    assert everywhere.count("reply") == everywhere.count("task") == 4
    assert "identifiers" not in caplog.text
    names = {where for where, _ in everywhere.seen}
    for file in ("ledger.sqlite", "audit.jsonl"):
        assert sum(name.endswith(f"state/{file}") for name in names) == 2
    assert {"history.jsonl", "summary.json"} <= names


def _quote(site: str = "north") -> str:
    return json.dumps(_records(site))


def _explode(*args: object, **kwargs: object) -> NoReturn:
    """As a third party's code would: with the record in message, note, cause and arguments."""
    try:
        raise KeyError(_quote())
    except KeyError as cause:
        error = RuntimeError(f"cannot handle {_quote()}", _quote("south"))
        error.add_note(_quote())
        raise error from cause


def _in_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.examples, "load_records", _explode)


def _in_scrubber(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.scrub, "FINDERS", {"emails": _explode})


def _in_tokeniser(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize = common.prompts.tokenize

    def explode_on_records(prompt: Prompt, **options: Any) -> Example:
        return _explode() if "Quxley" in prompt.output else tokenize(prompt, **options)

    monkeypatch.setattr(common.prompts, "tokenize", explode_on_records)


def _in_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.training, "train", _explode)


def _in_egress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.training, "check_adapter", _explode)


@pytest.mark.parametrize(
    ("plant", "code"),
    [
        (_in_loader, "internal"),
        (_in_scrubber, "data"),
        (_in_tokeniser, "data"),
        (_in_trainer, "internal"),
        (_in_egress, "internal"),
    ],
)
def test_an_exception_that_quotes_records_lets_no_identifier_out(
    plant: Callable[[pytest.MonkeyPatch], None],
    code: str,
    simulation: Simulation,
    everywhere: Everywhere,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: Any,
) -> None:
    for source in simulation.sources:
        source.settings["data"]["scrub"] = ["emails"]
    plant(monkeypatch)

    with (
        _listening(everywhere, caplog, capfd),
        pytest.raises(QuorumError, match=f"north: site-{code}, south: site-{code}") as stopped,
    ):
        run_simulation(simulation)

    everywhere.add("the coordinator's error", str(stopped.value))
    everywhere.add_files(simulation.out)
    everywhere.check()
    assert everywhere.count("reply") == 4
    assert "task refused or failed" in caplog.text


def test_a_site_that_cannot_even_answer_lets_no_identifier_out(
    simulation: Simulation,
    everywhere: Everywhere,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: Any,
) -> None:
    """No signed reply then, only Flower's own error, which carries a reason to the coordinator."""

    def broken(folder: Path) -> NoReturn:
        _explode()

    broken.cache_clear = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(client.in_process, "open_site", broken)
    quick = simulation.config.replace({"federation.join-timeout-s": 0.2})

    with (
        _listening(everywhere, caplog, capfd),
        pytest.raises(QuorumError, match="0 of 2 sites") as stopped,
    ):
        run_simulation(Simulation(quick, simulation.sources, simulation.out, simulation.base_dir))

    everywhere.add("the coordinator's error", str(stopped.value))
    everywhere.add_files(simulation.out)
    everywhere.check()
    assert everywhere.count("error of a reply") >= 2


def _row(**fields: str) -> bytes:
    return json.dumps(fields).encode() + b"\n"


# File ending, and what stands under that name instead of a data set.
FILES: dict[str, tuple[str, Callable[[Path, str], object]]] = {
    "a cut JSON line": (".jsonl", lambda path, text: path.write_text(text[:-20])),
    "no JSON object": (".jsonl", lambda path, text: path.write_text(json.dumps([text]))),
    "not UTF-8": (".csv", lambda path, text: path.write_bytes(b"a,b\n" + text.encode() + b"\xff")),
    "an open quote": (".csv", lambda path, text: path.write_text(f'a,b\n"{text}')),
    "no Parquet": (".parquet", lambda path, text: path.write_text(text)),
    "of no kind": (".txt", lambda path, text: path.write_text(text)),
    "an empty folder": ("", lambda path, text: path.mkdir()),
    "not there": (".jsonl", lambda path, text: None),
    "empty": (".jsonl", lambda path, text: path.write_text("")),
    "no answers": (".jsonl", lambda path, text: path.write_bytes(_row(instruction=text))),
    "no patients": (
        ".jsonl",
        lambda path, text: path.write_bytes(_row(instruction=text, output=text)),
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_data_set_that_cannot_be_read_lets_neither_text_nor_file_name_out(
    kind: str,
    tmp_path: Path,
    tiny_model_dir: Path,
    everywhere: Everywhere,
    caplog: pytest.LogCaptureFixture,
    capfd: Any,
) -> None:
    suffix, spoil = FILES[kind]
    hospital = _hospital(tmp_path / "home", tiny_model_dir, suffix=suffix)
    spoil(hospital.folder / f"Zanthippa Quxley{suffix}", json.dumps(_records("north")[0]))

    with _listening(everywhere, caplog, capfd):
        code = _answer(hospital, everywhere)

    everywhere.add_files(hospital.folder / "state")
    everywhere.check()
    assert code == DataError.code
    assert "task refused or failed" in caplog.text


def test_a_record_that_is_skipped_is_counted_without_a_word_of_it(
    tmp_path: Path,
    tiny_model_dir: Path,
    everywhere: Everywhere,
    caplog: pytest.LogCaptureFixture,
    capfd: Any,
) -> None:
    hospital = _hospital(tmp_path / "home", tiny_model_dir, suffix=".jsonl")
    rows = [*_records("north"), {**_records("north")[0], "output": ""}]
    path = hospital.folder / "Zanthippa Quxley.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    with _listening(everywhere, caplog, capfd):
        code = _answer(hospital, everywhere)

    everywhere.add_files(hospital.folder / "state")
    everywhere.check()
    assert code == ""
    assert f"skipped 1 of {len(rows)} incomplete records" in caplog.text


def _hospital(folder: Path, model_dir: Path, *, suffix: str) -> Hospital:
    return make_hospital(
        folder,
        model_dir,
        data={
            "path": f"Zanthippa Quxley{suffix}",
            "unit": "patient",
            "patient-id": "patient",
        },
        settings={
            "privacy.unit": "patient",
            "privacy.max-records-per-patient": VISITS,
            "privacy.noise-multiplier": 2.0,
        },
    )


def _answer(hospital: Hospital, everywhere: Everywhere) -> str:
    task = hospital.task()
    envelope = hospital.open().answer(hospital.seal(task))
    everywhere.add("reply", envelope.payload + envelope.signature + bytes(envelope.adapter))
    public = SigningKey.load(hospital.folder / "keys" / "signing.pem").public_hex
    return open_reply(envelope, task=task, site="north", public_hex=public).error_code
