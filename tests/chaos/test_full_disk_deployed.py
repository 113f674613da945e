"""A disk that is full for a while under a deployment that goes: SuperLink and SuperNodes meet it too.

By hand, since it takes minutes: CONSILIUM_LONG=1. Flower answers HTTP 500 then, at which SuperNodes'
heartbeats and the superexec die.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from client.ledger import Ledger
from common.audit_log import verify_audit_log
from common.signing import SigningKey
from tests.chaos.disks import full, small_disk
from tests.integration.commands import Commands, write_federation

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(
        "CONSILIUM_LONG" not in os.environ, reason="takes minutes: CONSILIUM_LONG=1"
    ),
]

logger = logging.getLogger(__name__)

FULL_S = 60.0


@pytest.mark.parametrize("whose", ["coordinator", "hospital"])
def test_a_run_goes_on_by_itself_once_there_is_space_again(whose: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "train.rounds": 6,
        "privacy.unit": "record",
        "privacy.noise-multiplier": 2.0,
        "privacy.accountant": "rdp",
        "federation.max-retries": 5,
    }
    federation = write_federation(tmp_path, settings)
    first = federation.sites[0]
    disk = federation.coordinator if whose == "coordinator" else federation.site(first) / "state"
    disk.mkdir(exist_ok=True)
    out = federation.coordinator / "runs" / "full"

    def events(kind: str) -> list[dict[str, Any]]:
        return [event for event in commands.events(out) if event["event"] == kind]

    with small_disk(disk, size_bytes=64 << 20), Commands(federation) as commands:
        commands.up("server")
        commands.wait_for_superlink()
        for site in federation.sites:
            commands.enrol(site)
            commands.up(site)
        commands.run(
            *("server", "run", str(federation.run_file), str(federation.coordinator)),
            *("--out", str(out), "--detach"),
        )
        commands.wait_until(lambda: events("round"), "a first round", timeout_s=240)
        with full(disk, leave_bytes=0):
            time.sleep(FULL_S)
        freed = time.monotonic()
        before = len(events("round"))
        commands.wait_until(
            lambda: len(events("round")) > before, "a round with space again", timeout_s=300
        )
        logger.warning("a round was merged %.0f s after there was space", time.monotonic() - freed)
        commands.wait_until(lambda: events("finished"), "the run finishes", timeout_s=400)

        assert [event["round"] for event in events("round")] == [1, 2, 3, 4, 5, 6]
        key = SigningKey.load(federation.coordinator / "signing.pem")
        verify_audit_log(federation.coordinator / "audit.jsonl", public_hex=key.public_hex)
        for site in federation.sites:
            folder = federation.site(site)
            public = SigningKey.load(folder / "keys" / "signing.pem").public_hex
            verify_audit_log(folder / "state" / "audit.jsonl", public_hex=public)
            rows = Ledger(folder / "state" / "ledger.sqlite").rows(site)
            assert {row.state for row in rows} == {"released"}
            assert len({row.task_id for row in rows}) == len(rows) == 6
