"""What the coordinator answers to whom, asked from another machine's address."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.commands import Commands, write_federation
from tests.integration.network import COORDINATOR, hospital_network

pytestmark = pytest.mark.integration

PATHS = (
    "/health", "/v1/fleet/pull-messages", "/v1/control/start-run", "/v1/control/list-runs",
    "/v1/control/register-node", "/v1/runtime/get-run", "/docs", "/openapi.json",
)  # fmt: skip
_ASK = """
import http.client, json, ssl, sys
host, port, *paths = sys.argv[1:]
context = ssl._create_unverified_context()
found = {}
for path in paths:
    connection = http.client.HTTPSConnection(host, int(port), timeout=20, context=context)
    connection.request("POST", path, body=b"x")
    found[path] = connection.getresponse().status
    connection.close()
print(json.dumps(found))
"""


def test_from_elsewhere_only_the_fleet_api_and_health_are_answered(tmp_path: Path) -> None:
    federation = write_federation(tmp_path, host=COORDINATOR)
    ask = [sys.executable, "-c", _ASK, COORDINATOR, str(federation.port), *PATHS]
    with hospital_network() as namespace, Commands(federation) as commands:
        commands.up("server")
        commands.wait_for_superlink()
        outside, inside = (
            json.loads(subprocess.run([*prefix, *ask], check=True, capture_output=True).stdout)
            for prefix in (["ip", "netns", "exec", namespace], [])
        )
        # By the coordinator's own commands, over loopback.
        commands.enrol(federation.sites[0])
    refused = {path for path, status in outside.items() if status == 403}
    assert refused == {path for path in PATHS if not path.startswith(("/health", "/v1/fleet/"))}
    assert not any(inside[path] == 403 for path in refused)
