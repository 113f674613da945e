"""A hospital whose line is cut in the middle of a round, in a network namespace of its own.

The cable is pulled, so to say: no packet comes through and nobody is told, so that both ends still take
their connections for open. By hand, since waiting for time-outs takes minutes: CONSILIUM_LONG=1.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.ledger import Ledger
from tests.integration.commands import Commands, write_federation
from tests.integration.network import COORDINATOR, hospital_network, ip

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(
        "CONSILIUM_LONG" not in os.environ, reason="takes minutes: CONSILIUM_LONG=1"
    ),
]

logger = logging.getLogger(__name__)

# Longer than Flower needs to call a node gone.
CUT_S = 90.0


@pytest.fixture
def namespace() -> Iterator[str]:
    with hospital_network() as name:
        yield name


def test_a_hospital_whose_line_is_cut_comes_back_and_the_run_finishes(
    namespace: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"train.rounds": 3, "privacy.unit": "record",
                                "privacy.noise-multiplier": 2.0, "privacy.accountant": "rdp"}  # fmt: skip
    federation = write_federation(tmp_path, settings, host=COORDINATOR)
    cut_off, other = federation.sites
    out = tmp_path / "run"

    def events(kind: str) -> list[dict[str, Any]]:
        return [event for event in commands.events(out) if event["event"] == kind]

    with Commands(federation) as commands:
        commands.prefix[cut_off] = ["ip", "netns", "exec", namespace]
        commands.up("server")
        commands.wait_for_superlink()
        for site in (cut_off, other):
            commands.enrol(site)
            commands.up(site)
        commands.run(
            *("server", "run", str(federation.run_file), str(federation.coordinator)),
            *("--out", str(out), "--detach"),
        )
        commands.wait_until(
            lambda: any(event["round"] == 2 for event in events("round-started")),
            "round 2 begins",
            timeout_s=240,
        )
        # Long enough for the task to be there, too short for the reply.
        time.sleep(5.0)
        ip("-n", namespace, "link", "set", "csl-there", "down")
        cut = time.monotonic()
        time.sleep(CUT_S)
        ip("-n", namespace, "link", "set", "csl-there", "up")
        commands.wait_until(lambda: events("finished"), "the run finishes", timeout_s=300)
        logger.warning("finished %.0f s after the line was back", time.monotonic() - cut - CUT_S)

    assert [event["round"] for event in events("round")] == [1, 2, 3]
    for event in events("round"):
        assert event["sites"] == sorted(federation.sites)
    rows = Ledger(federation.site(cut_off) / "state" / "ledger.sqlite").rows(cut_off)
    assert [row.state for row in rows] == ["released"] * 3
