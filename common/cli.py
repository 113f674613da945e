"""The `consilium` command: finds the groups that are installed, and turns errors into exit codes.

A group is an entry point in `consilium.commands` whose value is a Typer app, so that this module
imports neither server, client nor simulations.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from importlib.metadata import entry_points
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler

from common import model_cli
from common.errors import ConfigError, ConsiliumError

GROUP = "consilium.commands"
# The one group that needs no entry point.
OWN_GROUP = "model"
INTERRUPTED = 130

# Emoji codes are letters in a path and an address.
console = Console(emoji=False)
# What is no answer of a command: trouble on the way, and what goes on.
notes = Console(stderr=True, emoji=False)


def build_app() -> typer.Typer:
    """Return the command with every group that is installed."""
    app = typer.Typer(
        name="consilium",
        help="Hospitals fine-tune one language model together; no record leaves any of them.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def options(
        verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every event.")] = False,
    ) -> None:
        set_up_logging(verbose=verbose)

    app.add_typer(model_cli.app, name=OWN_GROUP)
    entries = {entry.name: entry for entry in entry_points(group=GROUP)}
    # A group that is named is all that this command line needs: others would load torch for nothing.
    named = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    wanted = [named] if named in {*entries, OWN_GROUP} else sorted(entries)
    for entry in (entries[name] for name in wanted if name in entries):
        group = entry.load()
        if isinstance(group, typer.Typer):
            app.add_typer(group, name=entry.name)
        else:
            app.command(name=entry.name)(group)
    return app


def say(text: str) -> None:
    """Print a text as it is: folders' names hold brackets, and a script reads whole lines."""
    console.print(text, soft_wrap=True, markup=False)


def set_up_logging(*, verbose: bool) -> None:
    """Send our log to stderr and quieten what libraries say of themselves."""
    level = logging.INFO if verbose else logging.WARNING
    handler = RichHandler(console=notes, show_path=False, show_time=verbose)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    for package in ("common", "client", "server", "simulations"):
        logging.getLogger(package).setLevel(level)
    if not verbose:
        for library in ("transformers", "bitsandbytes", "peft", "flwr"):
            logging.getLogger(library).setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def main() -> None:
    """Run the command; every ConsiliumError ends as one readable paragraph and its exit code."""
    try:
        build_app()()
    except ConsiliumError as error:
        _end_with(error)
    except PermissionError as error:
        # Agent, node and coordinator each have a user of their own: anybody is the wrong one somewhere.
        what = error.filename or "something that this command needs"
        _end_with(
            ConfigError(
                f"{what} is not to be read or written by this user ({error.strerror}); run this as the user "
                "whose it is, or name another place"
            )
        )
    except SystemExit as end:
        # Typer turns Ctrl-C into this exit code before we see it.
        if end.code == INTERRUPTED:
            notes.print("[yellow]interrupted[/]; what was saved stands")
        raise


def _end_with(error: ConsiliumError) -> NoReturn:
    notes.print(f"[bold red]error[/] ({error.code}): ", end="")
    notes.print(str(error), markup=False, highlight=False)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
