"""`consilium server plan`: what a run will spend, weigh and take, before anything starts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from common.canonical import plain_json
from common.cli import console, say
from common.config import load_run_config
from server.coordinator import load_coordinator

if TYPE_CHECKING:
    from server.plan import PlannedRun


def plan(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run's settings.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The coordinator's folder.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For another program to read.")] = False,
) -> None:
    """What a run would spend at each site, weigh and take; nothing is started or written.

    Whatever `server run` would refuse is refused here in the same words.
    """
    # Only here, because they load torch.
    from server.orders import plan_order

    coordinator = load_coordinator(folder)
    config = load_run_config(run_file, overrides=overrides or ())
    with console.status("Planning the run"):
        planned = plan_order(coordinator, config, base_dir=run_file.resolve().parent)
    if as_json:
        typer.echo(json.dumps(plain_json(planned.as_json()), indent=2, allow_nan=False))
        return
    from server.plan import plan_sentences

    console.print(_table(planned))
    for sentence in plan_sentences(planned):
        say(sentence)
    console.print("Nothing was started and nothing was written.")


def _table(planned: PlannedRun) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("site", overflow="fold")
    # Down and up are the same shape.
    for name in ("size", "q", "sigma", "epsilon", "steps", "rank", "bytes each way"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in planned.sites:
        protected = math.isfinite(one.epsilon)
        table.add_row(
            one.site,
            f"{one.declared_size:,}",
            f"{one.sample_rate:.4g}",
            f"{one.noise_multiplier:.4g}" if protected else "none",
            f"{one.epsilon:.3f}" if protected else "infinite",
            f"{one.steps:,}",
            str(one.rank) if one.rank_known else f"{one.rank}?",
            f"{one.bytes_down:,}",
        )
    return table
