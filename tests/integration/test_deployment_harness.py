"""The harness that other tests stand on: TLS, authenticated nodes, one process for each app."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.deployment import Deployment, DeploymentError
from tests.integration.echo_app import write_echo_app

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    app_dir = write_echo_app(tmp_path_factory.mktemp("app"))
    with Deployment(tmp_path_factory.mktemp("lab"), app_dir) as running:
        yield running


def test_two_rounds_on_two_authenticated_nodes_over_tls(
    deployment: Deployment, tmp_path: Path
) -> None:
    deployment.add_node(
        "north", node_config={"site-dir": "/a folder/north"}, environment={"CONSILIUM_PROBE": "n"}
    )
    deployment.add_node("south", environment={"CONSILIUM_PROBE": "s"})
    out = tmp_path / "out.json"
    run_id = deployment.submit({"out": str(out)})
    assert deployment.wait(run_id, timeout_s=300) == "finished:completed"
    seen = json.loads(out.read_text())
    for replies in seen["rounds"]:
        assert sorted(reply["probe"] for reply in replies) == ["n", "s"]
        assert all(reply["same_bytes"] for reply in replies)
        north = next(reply for reply in replies if reply["probe"] == "n")
        assert json.loads(north["node_config"]) == {"site-dir": "/a folder/north"}
    assert seen["cwd"] == str(deployment.folder)


def test_a_node_whose_key_is_not_registered_is_refused(deployment: Deployment) -> None:
    deployment.add_node("stranger", register=False)
    with pytest.raises(DeploymentError, match=r"(?s)supernode-stranger ended.*code: 2004"):
        deployment.wait_until_online("stranger")
    deployment.kill("supernode-stranger")
    deployment.kill("superexec-stranger")


def test_a_server_app_that_raises_ends_the_run_as_failed(deployment: Deployment) -> None:
    run_id = deployment.submit({"fail": True})
    assert deployment.wait(run_id, timeout_s=300) == "finished:failed"
    assert "asked to fail" in deployment.log_file(f"run-{run_id}").read_text()
