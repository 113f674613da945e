"""`consilium server export`, `release`, `release-key`, `verify`: a finished run's model handed on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from common.cli import console, say
from common.errors import ConfigError, ReleaseError
from server.release.key import PRIVATE_FILE, make_release_key

if TYPE_CHECKING:
    from server.export.model import ExportReport, OnStep

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A finished run's folder.")]
Model = Annotated[
    Path | None, typer.Option(help="The base model's folder, where it is not where the run had it.")
]
Data = Annotated[
    list[Path] | None,
    typer.Option(help="Records to measure on, in place of the run's own; may be repeated."),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"],
    typer.Option(help="The precision of a merged export, and that an adapter is checked in."),
]
Force = Annotated[
    bool, typer.Option(help="Replace an earlier export or release there, and nothing else.")
]


def export(
    run_dir: RunDir,
    form: Annotated[
        Literal["adapter", "merged"],
        typer.Option("--format", help="A PEFT folder, or the adapter merged into the base."),
    ] = "adapter",
    out: Annotated[Path | None, typer.Option(help="Default: RUN_DIR/export/FORMAT.")] = None,
    model: Model = None,
    data: Data = None,
    dtype: Dtype = "float32",
    force: Force = False,
) -> None:
    """Export a finished run's model, load it back, and measure that it is the same one."""
    # Only here, because they load torch.
    from server.evaluation import record_files
    from server.export.folder import check_place, placing
    from server.export.model import STEPS, ExportRequest, write_export
    from server.finished_run import find_base, load_finished_run

    target, within = (out, None) if out else (run_dir / "export" / form, run_dir)
    check_place(target, within=within, force=force)
    run = load_finished_run(run_dir)
    base = find_base(run, given=model)
    request = ExportRequest(
        run, base, form, dtype, tuple(record_files(data or ())) or run.central_files
    )
    with (
        progress(f"export {form}", STEPS) as on_step,
        placing(target, within=within, force=force) as folder,
    ):
        report = write_export(request, folder, on_step=on_step)
    console.print(report_table(report))
    say(f"Wrote {target}: {_CONTENTS[form]}")


_CONTENTS = {
    "adapter": "a PEFT adapter, which PeftModel.from_pretrained loads on the base model, and export.json",
    "merged": "a whole model, which AutoModelForCausalLM.from_pretrained loads, and export.json",
}


def release(
    run_dir: RunDir,
    out: Annotated[Path | None, typer.Option(help="Default: RUN_DIR/release.")] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            help="The release key; default: release.pem of the coordinator whose runs/ this is in."
        ),
    ] = None,
    form: Annotated[
        Literal["merged", "adapter"],
        typer.Option("--format", help="As of `server export`."),
    ] = "merged",
    name: Annotated[str, typer.Option(help="What the model is called in its card.")] = "",
    base_license: Annotated[
        str, typer.Option(help="The base model's licence, where its folder does not say it.")
    ] = "",
    name_sites: Annotated[
        bool, typer.Option("--name-sites", help="Call the hospitals by their names in the card.")
    ] = False,
    model: Model = None,
    data: Data = None,
    dtype: Dtype = "float32",
    force: Force = False,
) -> None:
    """Export a finished run's model with a model card, a list of parts, and a signature over all of it."""
    # Only here, because they load torch.
    from server.evaluation import record_files
    from server.export.folder import check_place, placing
    from server.export.model import ExportRequest
    from server.finished_run import find_base, load_finished_run
    from server.release.releasing import STEPS, ReleaseRequest, check_release, write_release
    from server.release.signature import SIGNATURE

    target, within = (out, None) if out else (run_dir / "release", run_dir)
    check_place(target, within=within, force=force)
    run = load_finished_run(run_dir)
    files = tuple(record_files(data or ())) or run.central_files
    request = ReleaseRequest(
        ExportRequest(run, find_base(run, given=model), form, dtype, files),
        key=key or run_dir.resolve().parent.parent / PRIVATE_FILE,
        base_license=base_license,
        name=name,
        named_sites=name_sites,
    )
    check_release(request)
    with (
        progress("release", STEPS) as on_step,
        placing(target, within=within, force=force) as folder,
    ):
        report = write_release(request, folder, on_step=on_step)
    console.print(report_table(report))
    say(
        f"Wrote {target}: the {form} export, README.md (its model card), run.toml, sbom.cdx.json, "
        f"{SIGNATURE}\n"
        f"Read README.md before you hand it on. Check it: consilium server verify "
        f"{quote(str(target))} --key {quote(str(request.key.with_suffix('.pub')))}"
    )


def release_key(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The coordinator's folder, or any other.")
    ],
) -> None:
    """Make the key that releases are signed by, ECDSA P-384; an earlier Ed25519 one is set aside."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made a folder ({error.strerror}); choose another one"
        ) from None
    key = make_release_key(folder)
    wrote = f"Wrote {key.private}" if key.is_new else f"Kept {key.private} as it was"
    say(
        f"{wrote}, which stays here, and wrote {key.public}, which whoever checks a release needs.\n"
        f"SHA-256 of {key.public.name}, to compare by another way: {key.fingerprint}"
    )


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A release's folder.")],
    key: Annotated[Path, typer.Option(help="The release.pub that the coordinator gave you.")],
    as_json: Annotated[bool, typer.Option("--json", help="For another program to read.")] = False,
) -> None:
    """Check that a release is what its coordinator signed, to the byte; exit code 9 when it is not."""
    from server.release.signature import verify_folder

    with console.status(f"Reading {escape(str(folder))}"):
        found = verify_folder(folder, key=key)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    elif found.differences:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in ("path", "what", "signed as"):
            table.add_column(name, overflow="fold")
        for one in sorted(found.differences):
            table.add_row(_shown(one.path), one.change, _shown(one.before))
        console.print(table)
    if found.differences:
        raise ReleaseError(
            f"{folder} is not what was signed: {len(found.differences)} of its paths differ; do not use it, "
            "and get it again"
        )
    if not as_json:
        say(
            f"{folder} is what the owner of {key} signed: {found.files} files, each to the byte, and nothing "
            "beside them"
        )


def _shown(path: str) -> str:
    """A path as a terminal may show it: whoever added a file chose its name."""
    return escape(path if path.isprintable() else ascii(path))


@contextmanager
def progress(title: str, steps: int) -> Iterator[OnStep]:
    """Show how many of some steps are done, and what is done now."""
    from transformers.utils import logging

    # Its own bars would be written across this one.
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with Progress(
        TextColumn("[bold]{task.description}[/]"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        console=console,
    ) as bar:
        task = bar.add_task(title, total=steps, state="starting")
        done = count()

        def on_step(state: str) -> None:
            bar.update(task, completed=next(done), state=state)

        yield on_step
        bar.update(task, completed=steps, state="done")


def report_table(report: ExportReport) -> Table:
    """Return what an export measured: a line for each form of the model."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(f"loss on {report.records} {report.measured_on}", overflow="fold")
    table.add_column("loss", justify="right", no_wrap=True)
    table.add_column("from the export", justify="right", no_wrap=True)
    for name, loss in (
        (f"the export, loaded back, {report.dtype}", report.loss),
        (f"adapter on the base, {report.dtype}", report.adapter_loss),
        (f"adapter on the base as the run had it, {report.quantization}", report.run_loss),
    ):
        table.add_row(name, f"{loss:.6f}", f"{loss - report.loss:+.1e}")
    table.caption = f"the first two may differ by {report.tolerance:g}"
    table.caption_justify = "left"
    return table
