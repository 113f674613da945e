"""`consilium server report`: a run's report, or several runs on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from common.cli import console, notes, say
from common.errors import ConfigError, ConsiliumError
from common.files import write_atomically
from server.run_folder import RunFolder

# What a run that has finished leaves, in the order in which people want it.
_OF_A_RUN = ("adapter/", "summary.json", "evaluation.json", "history.jsonl", "checkpoints/")


def report(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_DIR...", help="Runs' folders; several are compared."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file to write. Default: RUN_DIR/report.html; of several, comparison.html."
        ),
    ] = None,
) -> None:
    """Write a report as one HTML file that needs no network: of a run that goes, has ended, or failed."""
    # Only here, because it loads matplotlib.
    from server.report.comparison import comparison_page
    from server.report.page import run_page
    from server.report.reading import read_run

    with console.status("Drawing the report"):
        if len(run_dirs) == 1:
            page = run_page(read_run(run_dirs[0]))
            path = out or RunFolder(run_dirs[0], "").report
        else:
            page = comparison_page(run_dirs)
            path = out or Path("comparison.html")
        try:
            write_atomically(path, page.encode())
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written ({error.strerror}); name another file with --out"
            ) from None
    say(f"Wrote {path}: {len(page.encode()) / 1e6:.2g} MB, open it in a browser")


def run_is_done(run_dir: Path) -> None:
    """Draw the report of a run that has finished, and say what is in its folder."""
    drawn = try_report(run_dir)
    names = [name for name in _OF_A_RUN if (run_dir / name).exists()]
    names += [drawn.name] if drawn is not None else []
    say(f"Wrote {run_dir}: {', '.join(names)}")


def say_written(path: Path) -> None:
    """Say that a file was written into a run's folder; a report there is drawn again, with what it says."""
    say(f"Wrote {path}")
    drawn = draw_again(path.parent)
    if drawn is not None:
        say(f"Drew {drawn} again, with it")


def draw_again(run_dir: Path) -> Path | None:
    """Draw a run's report again where there is one, so that it is not out of date; return its path."""
    return try_report(run_dir) if RunFolder(run_dir, "").report.is_file() else None


def try_report(run_dir: Path) -> Path | None:
    """Write a run's report and return its path; None, after a word about it, where that is not possible.

    For the end of a run, which a report that cannot be drawn must not spoil.
    """
    # Only here, because it loads matplotlib.
    from server.report.page import write_report

    try:
        with notes.status("Drawing the report"):
            return write_report(run_dir)
    except ConsiliumError as error:
        trouble = str(error)
    except Exception as error:
        # Whatever what draws may raise: the run is done.
        trouble = f"{type(error).__name__}: {error}"
    notes.print(f"[yellow]No report was written: {escape(trouble)}[/yellow]", soft_wrap=True)
    return None
