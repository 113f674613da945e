"""A hospital's status: what runs, what was last done, and what to do; without torch."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from client import site_status as module
from client.agent_pb2 import AgentStatus, Work
from client.site_config import load_site_config
from client.site_status import site_status, status_tables
from common.canonical import canonical_json
from common.locks import hold_lock
from common.supervisor_state import ChildState, SupervisorState
from tests.unit.hospital import Hospital, make_hospital


@pytest.fixture
def hospital(tmp_path: Path, tiny_model_dir: Path) -> Hospital:
    hospital = make_hospital(tmp_path / "north", tiny_model_dir)
    hospital.open()
    return hospital


def _printed(folder: Path) -> str:
    text = io.StringIO()
    # A test's folder has a long name.
    console = Console(width=300, file=text)
    for part in status_tables(site_status(load_site_config(folder))):
        console.print(part)
    return text.getvalue()


def test_a_site_where_nothing_runs_says_how_to_start_it(hospital: Hospital) -> None:
    said = _printed(hospital.folder)
    assert "down" in said
    assert "Nothing runs; start it: consilium client up --site" in said


def test_what_runs_and_what_is_trained_is_told(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    state = hospital.folder / "state"
    children = (
        ChildState("agent", os.getpid(), "running", now - 3, 2, -9),
        ChildState("supernode", 0, "waiting", now, 0, 49),
    )
    SupervisorState(os.getpid(), now, "mark", children).write(state / "up.json")
    work = Work(run="0123456789abcdef", server_round=3, step=7, steps=20, since=now)
    agent = AgentStatus(
        pid=41, since=now - 600, work=work, base_digest="ab" * 32, answered=5, last_answer=now - 5
    )
    monkeypatch.setattr(module, "agent_status", lambda socket: agent)
    with hold_lock(state / "up.lock"):
        status = site_status(load_site_config(hospital.folder))
        said = _printed(hospital.folder)

    assert (status.up, status.advice) == (os.getpid(), ())
    for part in (
        f"up, process {os.getpid()}", "signal 9", "exit code 49", "process 41, for 10 min",
        "5 answered, the last 5 s ago", "abababababababab... in memory",
        "run 01234567, round 3, step 7 of 20",
    ):  # fmt: skip
        assert part in said
    content = json.loads(json.dumps(status.as_json()))
    assert [one["alive"] for one in content["processes"]] == [True, False]
    assert content["agent"]["step"] == 7


def test_an_agent_whose_node_is_another_users_is_not_down(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "agent_status", lambda socket: AgentStatus(site="north", pid=41))
    assert site_status(load_site_config(hospital.folder)).advice == ()
    said = _printed(hospital.folder)
    assert ": the agent alone" in said
    assert "down" not in said


def test_the_last_task_and_who_waits_for_approval_are_told(hospital: Hospital) -> None:
    site = hospital.open()
    site.answer(hospital.seal(hospital.task(expires_at=int(time.time()) - 5)))
    approvals = hospital.folder / "state" / "approvals"
    (approvals / "run-9.json").write_bytes(canonical_json({"state": "waiting"}))
    (approvals / "run-8.json").write_bytes(canonical_json({"state": "approved"}))

    status = site_status(load_site_config(hospital.folder))
    assert status.last_task is not None
    assert (status.last_task.event, status.last_task.what) == ("refused", "expired")
    assert status.waiting == 1
    assert "1 waiting for approval: consilium client approve" in _printed(hospital.folder)


def test_a_damaged_log_is_advice_and_no_end(hospital: Hospital) -> None:
    (hospital.folder / "state" / "audit.jsonl").write_text("not a log\n")
    assert any("audit" in one for one in site_status(load_site_config(hospital.folder)).advice)


def test_it_loads_no_torch(hospital: Hospital) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from client.site_config import load_site_config\n"
        "from client.site_status import site_status\n"
        "site_status(load_site_config(Path(sys.argv[1])))\n"
        "import client.up\n"
        "sys.exit(' '.join({'torch', 'transformers', 'datasets'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code, str(hospital.folder)], check=True)
