"""New keys, and revocation, under a real SuperLink: whose SuperNode is let in, and whose word counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.commands import Commands
from tests.integration.enrolled import make_and_enrol, must, plan_federation

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

# Flower's exit code 305, as a process can give it: the SuperLink does not let this node in.
REFUSED = "supernode ended with exit code 49"


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    federation = plan_federation(
        tmp_path_factory.mktemp("membership"), {"federation.min-sites": 1, "lora.rank": 64}
    )
    with Commands(federation) as commands:
        must(
            commands,
            *("server", "init", federation.coordinator),
            *("--address", f"127.0.0.1:{federation.port}"),
        )
        commands.up("server")
        commands.wait_for_superlink()
        for name in federation.sites:
            make_and_enrol(commands, name)
            commands.up(name)
        _wait_for_online(commands, 2)
        yield commands


def _wait_for_online(commands: Commands, count: int) -> None:
    def is_so() -> bool:
        nodes = commands.status()["nodes"]
        return nodes is not None and sum(node["online"] for node in nodes) == count

    commands.wait_until(is_so, f"{count} nodes are online", timeout_s=300)


def _log(commands: Commands, who: str) -> str:
    # Its lines are wrapped to the width of a terminal.
    return " ".join((commands.federation.folder / f"{who}.log").read_text().split())


def _wait_for_refusal(commands: Commands, who: str, *, after: int) -> None:
    commands.wait_until(
        lambda: _log(commands, who).count(REFUSED) > after, f"{who} is refused", timeout_s=300
    )


def _run(commands: Commands, name: str) -> dict[str, Any]:
    federation = commands.federation
    out = federation.folder / name
    must(commands, "server", "run", federation.run_file, federation.coordinator, "--out", out)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def test_a_hospital_with_new_keys_connects_with_them_and_not_with_the_old_ones(
    commands: Commands,
) -> None:
    federation = commands.federation
    north = federation.sites[0]
    site, bundle = federation.site(north), federation.folder / "rotated.json"
    former = {path: path.read_bytes() for path in (site / "keys").iterdir()}
    before = _log(commands, north).count(REFUSED)

    must(commands, "client", "rotate", "--site", site)
    said = must(
        commands,
        *("server", "enroll", site / "rotation.json", federation.coordinator, "--out", bundle),
    )
    assert f"{north} has new keys" in " ".join(said.split())
    # It runs with the old keys still.
    _wait_for_refusal(commands, north, after=before)

    commands.ups[north].terminate()
    assert commands.ups[north].wait(timeout=180) == 0
    must(commands, "client", "rotate", "--finish", bundle, "--site", site)
    assert not any(path.read_bytes() == content for path, content in former.items())
    commands.up(north)
    _wait_for_online(commands, 2)
    summary = _run(commands, "after-rotation")
    assert summary["sites"] == list(federation.sites)
    assert summary["rounds"][0]["refused"] == {}
    must(commands, "client", "log", "--verify", "--site", site)


def test_a_revoked_hospital_is_not_let_in_and_takes_no_part(commands: Commands) -> None:
    federation = commands.federation
    north, south = federation.sites
    before = _log(commands, south).count(REFUSED)
    must(
        commands,
        *("server", "revoke", south, federation.coordinator, "--why", "contract ended", "--yes"),
    )
    _wait_for_refusal(commands, south, after=before)
    assert [node["online"] for node in commands.status()["nodes"]] == [True]
    assert _run(commands, "without-south")["sites"] == [north]

    enrolment = federation.site(south) / "enrolment.json"
    code, said = commands.run(
        *("server", "enroll", str(enrolment), str(federation.coordinator), "--yes")
    )
    assert code == 2
    assert "a key that holds no more" in " ".join(said.split())
    log = must(commands, "server", "log", federation.coordinator)
    assert "contract ended" in log
    must(commands, "server", "log", "--verify", federation.coordinator)


def test_who_withdraws_while_the_coordinator_is_down_is_not_let_in_when_it_is_up(
    commands: Commands,
) -> None:
    federation = commands.federation
    north = federation.sites[0]
    commands.ups["server"].terminate()
    assert commands.ups["server"].wait(timeout=180) == 0
    said = must(commands, "client", "withdraw", "--site", federation.site(north), "--yes")
    assert "`consilium client up` was ended" in " ".join(said.split())
    assert commands.ups[north].wait(timeout=180) == 0
    statement = shutil.copy(federation.site(north) / "withdrawal.json", federation.folder)
    must(
        commands,
        *("server", "revoke", north, federation.coordinator),
        *("--withdrawal", statement, "--yes"),
    )
    before = _log(commands, north).count(REFUSED)
    database = federation.coordinator / "flower" / "state.db"
    was_bytes = database.stat().st_size
    commands.up("server")
    commands.wait_for_superlink()
    commands.up(north)
    _wait_for_refusal(commands, north, after=before)
    # Two adapters of 1.1 MB came and went; the next start gives their space back.
    assert database.stat().st_size < was_bytes / 2
    assert commands.status()["nodes"] == []
    revoked = json.loads(Path(federation.coordinator / "revoked.json").read_text())
    assert [one["why"] for one in revoked] == ["rotated", "contract ended", "withdrawn"]
