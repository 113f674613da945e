"""`consilium client agent / node / node-init / status / cancel`: the processes of a hospital's side."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from client.node import init_node
from client.site_config import load_site_config
from client.up import run_node, run_site
from common.canonical import plain_json
from common.cli import console, say, set_up_logging

SiteDir = Annotated[
    Path, typer.Option("--site", help="The hospital's folder, with site.toml in it.")
]
NodeDir = Annotated[Path, typer.Argument(metavar="NODE_DIR", help="The node's own folder.")]
Json = Annotated[bool, typer.Option("--json", help="For another program to read.")]


def up(site: SiteDir = Path()) -> None:
    """Connect this hospital to its coordinator and answer its tasks, until it is stopped."""
    set_up_logging(verbose=True)
    run_site(load_site_config(site))
    say(f"Stopped. Logs: {site / 'state' / 'flower'}")


def agent(site: SiteDir = Path()) -> None:
    """Run the agent alone: it holds data, model and keys, and answers whoever may open its socket."""
    set_up_logging(verbose=True)
    # A model's folder lies here; nothing asks a hub for anything.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Only here, because they load torch: the commands that keep processes up hold it in memory for weeks.
    from client.agent import run_agent
    from client.site import Site

    opened = Site.open(site)
    run_agent(opened)
    say(f"Stopped. What it did: {opened.audit.path}")


def node(folder: NodeDir) -> None:
    """Run the connection alone, as a user who sees no data: SuperNode and superexec."""
    set_up_logging(verbose=True)
    run_node(folder)
    say(f"Stopped. Logs: {folder / 'flower'}")


def node_init(
    folder: NodeDir,
    site: SiteDir = Path(),
    socket: Annotated[
        Path | None, typer.Option(help="The agent's socket; default: as site.toml says.")
    ] = None,
    address: Annotated[
        str,
        typer.Option(
            help="HOST:PORT that leads to the coordinator from there; default: the coordinator's."
        ),
    ] = "",
) -> None:
    """Write a folder of its own for the node's user, from a site that has joined."""
    written = init_node(folder, load_site_config(site), socket=socket, address=address)
    say(
        f"Wrote {written}, node, node.pub, ca.crt. Give {folder} to the node's user, then, as that user: "
        f"consilium client node {folder}"
    )


def status(site: SiteDir = Path(), as_json: Json = False) -> None:
    """What runs here, what is trained now, and what to do where something is wrong."""
    from client.site_status import site_status, status_tables

    found = site_status(load_site_config(site))
    if as_json:
        typer.echo(json.dumps(plain_json(found.as_json()), indent=2, allow_nan=False))
        return
    for part in status_tables(found):
        console.print(part)


def cancel(site: SiteDir = Path()) -> None:
    """Stop the task that is trained, at its next step; what it has cost stays charged."""
    from client.agent_control import cancel_task

    stopped = cancel_task(load_site_config(site).control_socket_path)
    where = site / "state" / "audit.jsonl"
    said = (
        f"Stopping at the next step; it will stand in {where}. The coordinator may ask again; to shut the "
        "run out: consilium client approve RUN --decline"
        if stopped
        else "Nothing is trained"
    )
    say(said)
