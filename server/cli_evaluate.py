"""`consilium server evaluate`: a finished run's result beside its base, by whatever is asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common.cli import console
from common.config import parse_overrides
from common.errors import ConfigError
from server.cli_report import draw_again, say_written

_SECTION = "evaluation."


def evaluate(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A finished run's folder.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Test records, in place of the run's own; may be repeated."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="evaluation.key=value (metrics, labels, group-by...); repeat."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="The base model's folder, where the run's is gone.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For another program to read.")] = False,
) -> None:
    """Measure a finished run's result beside its untouched base, and write evaluation.json."""
    # Only here, because they load torch.
    from server.evaluation import planned_passes, record_files
    from server.evaluation_tables import evaluation_tables
    from server.finished_run import find_base, load_finished_run
    from server.prepared_run import prepare_run
    from server.result import evaluate_result

    changes = parse_overrides(overrides or ())
    others = sorted(key for key in changes if not key.startswith(_SECTION))
    if others:
        raise ConfigError(
            f"--set {others[0]}: only evaluation.* can differ here from what the run was made with"
        )
    run = load_finished_run(run_dir)
    config = run.config.replace(changes)
    files = record_files(data or ())
    prepared = prepare_run(
        config,
        models={config.model.name: find_base(run, given=model)},
        central_files=files or run.central_files,
    )
    if prepared.central is None and not prepared.questions:
        raise ConfigError(
            f"{run_dir} was run without test records, or they are gone; name some with --data"
        )
    total = planned_passes(prepared.central, config, questions=len(prepared.questions))
    with Progress(
        TextColumn("[bold]{task.description}[/]"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=as_json,
    ) as bar:
        task = bar.add_task("evaluate", total=total)
        found = evaluate_result(
            prepared,
            run.adapter,
            config=config,
            run_uid=run.folder.run_uid,
            server_round=run.exported_round,
            on_batch=lambda done: bar.advance(task, done),
        )
    other = {path.resolve() for path in files} - {path.resolve() for path in run.central_files}
    found = replace(found, adapter=run.adapter_digest, other_records=bool(other))
    written = found.write(run.folder.evaluation)
    if as_json:
        typer.echo(json.dumps(written, indent=2, allow_nan=False))
        draw_again(run_dir)
        return
    for table in evaluation_tables(found):
        console.print(table)
    say_written(run.folder.evaluation)
