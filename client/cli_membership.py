"""`consilium client rotate` and `withdraw`: new keys, and leaving."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Annotated

import typer

from client.rotation import RUNNING_LOCKS, finish_rotation
from client.rotation import rotate as rotate_keys
from client.site_config import SiteConfig, load_site_config
from client.withdrawals import withdraw as withdraw_from
from common.cli import say
from common.enrolment import open_bundle
from common.locks import lock_holder

SiteDir = Annotated[
    Path, typer.Option("--site", help="The hospital's folder, with site.toml in it.")
]
_END_S = 45.0


def rotate(
    site: SiteDir = Path(),
    finish: Annotated[
        Path | None,
        typer.Option(
            help="The bundle with which the coordinator answered.", exists=True, dir_okay=False
        ),
    ] = None,
) -> None:
    """Make new keys for this hospital, to be sent to the coordinator; with --finish, use them."""
    config = load_site_config(site)
    if finish is None:
        made = rotate_keys(config)
        say(
            f"Wrote {made} and {site / 'keys' / 'next'}. The old keys stay in use. Send {made.name} to the "
            "coordinator; it holds public parts only and is signed by the old key, so no telephone call is "
            f"needed.\nNext, when its bundle is there: consilium client rotate --finish BUNDLE --site {site}"
        )
        return
    finish_rotation(config, open_bundle(finish.read_bytes()))
    say(
        f"Wrote {config.signing_key_path} and {config.node_key_path}: the new keys are in use, the old ones "
        f"are gone. Start again what runs here: consilium client up --site {site}, or the agent; a node with "
        "a folder of its own needs it anew: consilium client node-init"
    )


def withdraw(
    site: SiteDir = Path(),
    coordinator: Annotated[
        str, typer.Option(help="Its public key, where site.toml names several.")
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask again.")] = False,
) -> None:
    """Leave a coordinator: none of its tasks is done from now on, and it is told so, signed."""
    config = load_site_config(site)
    if not yes:
        typer.confirm("Leave this coordinator, and do nothing more for it?", abort=True)
    made = withdraw_from(config, coordinator=coordinator)
    ended = _end_what_runs(config)
    say(
        f"Wrote {made}: this hospital does nothing more for that coordinator{ended}. Send {made.name} to it; "
        "there: consilium server revoke SITE DIR --withdrawal FILE.\nWhat this hospital gave to runs until "
        "now stays in their adapters: nothing takes an update out of a model again. Ledger and audit log "
        "stay here. What a service manager starts again does nothing for that coordinator either."
    )


def _end_what_runs(config: SiteConfig) -> str:
    """End what answers tasks, so that nothing leaves that it trains now; say so."""
    said = [_end(config, command, lock) for command, lock in RUNNING_LOCKS.items()]
    return "".join(said)


def _end(config: SiteConfig, command: str, name: str) -> str:
    lock = config.folder / "state" / name
    holder = lock_holder(lock)
    if not holder:
        return ""
    try:
        os.kill(holder, signal.SIGTERM)
    except ProcessLookupError:
        return ""
    except PermissionError:
        return f"; `consilium client {command}`, process {holder}, is another user's: let that user end it"
    deadline = time.monotonic() + _END_S
    while lock_holder(lock) == holder and time.monotonic() < deadline:
        time.sleep(0.2)
    if lock_holder(lock) == holder:
        return f"; `consilium client {command}`, process {holder}, does not end: kill -9 {holder}"
    return f"; `consilium client {command}` was ended"
