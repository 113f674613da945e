"""A coordinator's folder without processes, and a run that was asked for in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli_w

from common.config import RunConfig
from common.signing import SigningKey
from server.certificates import make_authority, make_server_certificate, save_certified
from server.coordinator import Coordinator, load_coordinator
from server.history import History
from server.launch import Launch
from server.roster import Roster, RosterEntry
from server.run_folder import RunFolder, open_run_folder


def write_coordinator(folder: Path, **server: Any) -> Coordinator:
    """Write what a coordinator's folder holds; its sites' keys open nothing."""
    (folder / "tls").mkdir(parents=True)
    authority = make_authority("test")
    save_certified(authority, folder / "tls", "ca")
    made = make_server_certificate(authority, hosts=["127.0.0.1"])
    save_certified(made, folder / "tls", "server")
    (folder / "superexec.secret").write_bytes(bytes(32))
    SigningKey.generate().save(folder / "signing.pem")
    sites = [RosterEntry(name, "ab" * 32, 1000) for name in ("bern", "oslo")]
    Roster(sites).save(folder / "roster.json")
    (folder / "launches").mkdir()
    (folder / "flower").mkdir()
    settings = {"server": {"address": "127.0.0.1:9", **server}}
    (folder / "coordinator.toml").write_text(tomli_w.dumps(settings))
    return load_coordinator(folder)


def ask_for_run(coordinator: Coordinator, run_dir: Path, uid: str = "a" * 32) -> RunFolder:
    """Do what `server run` does, with no model to load."""
    config = RunConfig.parse({"run.uid": uid})
    folder = open_run_folder(run_dir, config)
    (coordinator.launches / f"{uid}.toml").write_text("")
    History(folder.history).record("requested", resume=False)
    Launch(
        run_dir=str(run_dir),
        key=str(coordinator.signing_key),
        roster=str(coordinator.roster_file),
        resume=True,
    ).save(coordinator.launches, uid)
    return folder
