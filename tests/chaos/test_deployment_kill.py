"""kill -9 in a real deployment, the short form: four deaths, and nobody helps it up but itself.

tests/chaos/long.py is the long form: every point, every process, again and again, and how long each took.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos.federation import RECOVERY_TIMEOUT_S, ChaosFederation

pytestmark = pytest.mark.chaos


# A deployment needs its time to start, and all that the cores have.
@pytest.mark.timeout(2400)
def test_a_deployment_gets_over_the_death_of_any_of_its_processes(tmp_path: Path) -> None:
    """In one run: a ServerApp in the middle of a merge, the SuperLink, then two hospitals at once."""
    rng = random.Random(0)
    with ChaosFederation(tmp_path) as federation:
        north, south = federation.sites
        federation.order_run()
        merging = federation.kill_at("in-merge", timeout_s=RECOVERY_TIMEOUT_S)
        federation.recovered(merging)
        linking = federation.kill_process("SuperLink", rng)
        federation.recovered(linking)
        # A ClientApp that has charged its steps and not answered, and the other hospital's whole node.
        training = federation.kill_at("mid-train", site=north)
        federation.kill_process("SuperNode", rng, site=south)
        federation.recovered(training)

        assert federation.stop() == []
        findings = federation.check()
    assert findings.faultless, findings.faults
    assert findings.rounds >= 3
    # Each site was charged once for each round, and perhaps for the one that goes: no death cost anything.
    assert findings.charges <= 2 * (findings.rounds + 1)
