"""`consilium server audit`: how leaky a run's training is, tried on a simulated twin of one of its sites."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from common.cli import console
from server.attack_progress import AttackProgress
from server.attack_report import say_attack, write_attack
from server.cli_report import say_written
from server.twin import find_audit, order_twin


def audit(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A finished run's folder.")],
    site: Annotated[str, typer.Option(help="Whose twin; default: the largest site's.")] = "",
    model: Annotated[
        Path | None, typer.Option(help="The base model's folder, where model.name is none.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Public records to train on; default: made-up ones.")
    ] = None,
    size: Annotated[
        int, typer.Option(help="The twin's records, where the run does not tell.", min=0)
    ] = 0,
    canaries: Annotated[
        int | None,
        typer.Option(help="Gradient canaries; more bound epsilon better; default: 40,000.", min=20),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the auditor's coins; never of the noise.")] = 0,
) -> None:
    """Attack a simulated twin of a run: bounds on epsilon, membership inference, planted identifiers.

    The twin trains with the run's settings, base model, declared size and noise, on records of its own.
    """
    attack = find_audit()
    order = order_twin(run_dir, site=site, size=size)
    with AttackProgress(console) as progress:
        order = replace(order, model=model, data=data, canaries=canaries, seed=seed)
        content = attack(replace(order, on_progress=progress))
    say_attack(content, console)
    say_written(write_attack(run_dir, content))
