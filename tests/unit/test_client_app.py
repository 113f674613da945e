"""The relay: it finds the site by node config alone, and lets no exception's text through."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import SITES_VARIABLE, app, site_folder
from client.in_process import open_site
from common.errors import ConfigError
from common.records import Envelope, Task, envelope_of, open_reply, seal_task, to_records
from common.signing import SigningKey
from tests.unit.hospital import make_hospital


def _context(**node_config: str | int) -> Context:
    return Context(1, 2, dict(node_config), RecordDict(), {"site-dir": "/from/the/run/config"})


def _message(records: RecordDict) -> Message:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(records, 2, "query")
    message.metadata.__dict__["_message_id"] = "m1"
    return message


def _describe(**content: Any) -> Task:
    return Task("describe", "run-1", "", 0, 1, int(time.time()) + 60, **content)


def test_a_task_goes_to_the_site_and_its_reply_comes_back(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    hospital = make_hospital(tmp_path / "north", tiny_model_dir)
    task = _describe(base_digest=hospital.base_digest, config=hospital.config.for_sites())
    records = to_records(seal_task(task, hospital.coordinator))

    reply = app(_message(records), _context(**{"site-dir": str(hospital.folder)}))

    public = SigningKey.load(hospital.folder / "keys" / "signing.pem").public_hex
    opened = open_reply(envelope_of(reply), task=task, site="north", public_hex=public)
    assert opened.error_code == ""
    open_site.cache_clear()


def test_a_failure_before_the_signature_is_checked_leaves_as_a_code(tmp_path: Path) -> None:
    secret = tmp_path / "Miller, John, born 1950"

    reply = app(
        _message(to_records(Envelope(b"{}", b"no signature"))),
        _context(**{"site-dir": str(secret)}),
    )

    assert reply.has_error()
    code, correlation_id = reply.error.reason.split()
    assert code == "config"
    assert len(correlation_id) == 12
    assert "Miller" not in repr(reply.error.__dict__)


def test_a_forged_task_gets_no_signed_answer(tmp_path: Path, tiny_model_dir: Path) -> None:
    hospital = make_hospital(tmp_path / "north", tiny_model_dir)
    records = to_records(seal_task(_describe(), SigningKey.generate()))

    reply = app(_message(records), _context(**{"site-dir": str(hospital.folder)}))

    assert reply.has_error()
    assert reply.error.reason.startswith("signature ")
    open_site.cache_clear()


def test_only_node_config_chooses_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SITES_VARIABLE, raising=False)
    assert site_folder(_context(**{"site-dir": "/srv/a"})) == Path("/srv/a")
    with pytest.raises(ConfigError, match="names neither an agent nor a site"):
        site_folder(_context())
    with pytest.raises(ConfigError, match="names neither an agent nor a site"):
        site_folder(_context(**{"partition-id": 0}))

    for name in ("south", "north"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv(SITES_VARIABLE, str(tmp_path))
    assert site_folder(_context(**{"partition-id": 0})) == tmp_path / "north"
    assert site_folder(_context(**{"partition-id": 1})) == tmp_path / "south"
    assert site_folder(_context(**{"site-dir": "/srv/a", "partition-id": 1})) == Path("/srv/a")


def test_the_relay_imports_neither_torch_nor_data_code() -> None:
    code = (
        "import sys, client.app; "
        "bad = {'torch', 'transformers', 'peft', 'opacus', 'datasets', 'client.site', "
        "'common.dataset'} & set(sys.modules); "
        "sys.exit(f'imported {sorted(bad)}' if bad else 0)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
