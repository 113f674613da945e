"""What the coordinator answers to whom: from another machine's address, and as another user of its own."""

from __future__ import annotations

import json
import os
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
import http.client, json, os, ssl, sys
host, port, user, *paths = sys.argv[1:]
context = ssl._create_unverified_context()
found = {}
for path in paths:
    connection = http.client.HTTPSConnection(host, int(port), timeout=120, context=context)
    connection.connect()
    if int(user) != os.geteuid():
        # As the system sees it, the connection is that user's from now on.
        os.fchown(connection.sock.fileno(), int(user), -1)
    connection.request("POST", path, body=b"x")
    found[path] = connection.getresponse().status
    connection.close()
print(json.dumps(found))
"""


NOBODY = 65534


def test_control_and_runtime_apis_answer_their_own_user_on_this_machine_alone(
    tmp_path: Path,
) -> None:
    federation = write_federation(tmp_path, host=COORDINATOR)

    def ask(*prefix: str, host: str, user: int) -> dict[str, int]:
        command = [*prefix, sys.executable, "-c", _ASK, host, str(federation.port), str(user)]
        asked = subprocess.run([*command, *PATHS], check=True, capture_output=True)
        answers: dict[str, int] = json.loads(asked.stdout)
        return answers

    with hospital_network() as namespace, Commands(federation) as commands:
        commands.up("server")
        commands.wait_for_superlink()
        own = os.geteuid()
        outside = ask("ip", "netns", "exec", namespace, host=COORDINATOR, user=own)
        another = [ask(host=host, user=NOBODY) for host in (COORDINATOR, "127.0.0.1")]
        inside = [ask(host=host, user=own) for host in (COORDINATOR, "127.0.0.1")]
        # By the coordinator's own commands, over loopback.
        commands.enrol(federation.sites[0])
    closed = {path for path in PATHS if not path.startswith(("/health", "/v1/fleet/"))}
    for answers in (outside, *another):
        assert {path for path, status in answers.items() if status == 403} == closed
    for answers in inside:
        assert 403 not in {answers[path] for path in closed}
