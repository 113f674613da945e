"""What runs left in the SuperLink's database goes, with its space; what Flower must remember stays."""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from flwr.common.constant import Status, SubStatus
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager

from common.errors import EngineError
from server.superlink_tidy import tidy, tidy_apart

# Of Alembic, which Flower calls.
pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")

ROOT = Path(__file__).parents[2]
OBJECT_BYTES = 3_000_000


def _state(database: Path) -> Any:
    store = ObjectStoreFactory(str(database))
    return LinkStateFactory(str(database), NoOpFederationManager(), store).state()


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A node, a run that ended and one that was cut off, each with a message that nobody fetched."""
    database = tmp_path / "state.db"
    state = _state(database)
    state.create_node("aid", "lab", b"a public key", 30.0)
    for number, ended in enumerate((True, False)):
        run = state.create_run("app", "1", "", {}, "federation", None, "aid", "serverapp")
        state.object_store.preregister(run, ObjectTree(object_id=f"{number}" * 64))
        if ended:
            [info] = state.get_run_info(run_ids=[run])
            assert state.claim_task(info.primary_task_id)
            assert state.activate_task(info.primary_task_id)
            assert state.finish_task(info.primary_task_id, SubStatus.COMPLETED, "")
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(
            "UPDATE objects SET content = zeroblob(?), is_available = 1", (OBJECT_BYTES,)
        )
    return database


def _size(database: Path) -> int:
    return sum(path.stat().st_size for path in database.parent.iterdir())


def test_what_runs_left_goes_and_the_file_is_small_again(database: Path) -> None:
    node = _state(database).get_node_id_by_public_key(b"a public key")
    before = _size(database)
    assert before > 2 * OBJECT_BYTES
    tidy(database)
    assert _size(database) < 1_500_000
    state = _state(database)
    assert len(state.object_store) == 0
    assert state.get_node_id_by_public_key(b"a public key") == node
    runs = state.get_run_info()
    assert [run.status.status for run in runs] == [Status.FINISHED] * 2
    assert {run.status.sub_status for run in runs} == {SubStatus.COMPLETED, SubStatus.STOPPED}


def test_it_is_done_in_a_process_of_its_own_and_said(
    database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="server.superlink_tidy")
    tidy_apart(database, environment={**os.environ, "PYTHONPATH": str(ROOT)})
    assert _size(database) < 1_500_000
    assert "bytes, and was" in caplog.text


def test_what_cannot_be_tidied_keeps_nobody_from_starting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tidy_apart(tmp_path / "missing.db", environment={})
    assert caplog.text == ""
    damaged = tmp_path / "state.db"
    damaged.write_bytes(b"no database" * 1000)
    tidy_apart(damaged, environment={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "could not be made small again" in caplog.text
    assert damaged.read_bytes() == b"no database" * 1000


def test_a_database_that_somebody_writes_to_is_left_as_it_is(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(
        "server.superlink_tidy.sqlite3.connect",
        lambda path, isolation_level: connect(path, isolation_level=isolation_level, timeout=0.1),
    )
    reader = connect(database)
    try:
        with monkeypatch.context() as patch:
            # As if it were cut after the runs were cleaned.
            patch.setattr(
                "server.superlink_tidy._free_bytes",
                lambda c: reader.execute("BEGIN IMMEDIATE") and 1 << 30,
            )
            with pytest.raises(EngineError, match=r"could not be rewritten \(database is locked\)"):
                tidy(database)
    finally:
        reader.close()
    tidy(database)
    assert _size(database) < 1_500_000
