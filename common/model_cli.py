"""`consilium model ...`: which model a folder holds, and whether a copy is that model. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from common.digest_list import parse_digest_list
from common.errors import ConfigError
from common.files import write_atomically
from common.model_folder import check_digest_list, check_model_folder, digest_files, is_digested

app = typer.Typer(no_args_is_help=True, help="Base model folders.")

# Standard output holds the answer alone.
_notes = Console(stderr=True, emoji=False)


@app.callback()
def group() -> None:
    """Base model folders."""


@app.command()
def digest(
    path: Annotated[Path, typer.Argument(help="A base model's folder.")],
    as_list: Annotated[
        bool, typer.Option("--list", help="Print the digest of each file, as sha256sum does.")
    ] = False,
    write: Annotated[
        Path | None, typer.Option(help="Write that list to a file, to travel with the folder.")
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="Check the folder against such a list, after copying it.")
    ] = None,
) -> None:
    """Print the digest of a base model folder, for site.toml's allowed-models."""
    if check is not None:
        try:
            expected = parse_digest_list(check.read_text(encoding="utf-8"), name=str(check))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{check} cannot be read as a digest list ({type(error).__name__}); give the file that "
                "`consilium model digest PATH --write FILE` wrote"
            ) from None
    if write is not None:
        _check_place(write, path)
    with _notes.status(f"Reading {escape(str(path))}"):
        if check is not None:
            check_digest_list(path, expected)
        check_model_folder(path)
        found = digest_files(path)
    typer.echo(found.text() if as_list else found.total, nl=not as_list)
    if check is not None:
        _notes.print(
            f"{path} is what {check} describes: {len(found.files)} files",
            soft_wrap=True,
            markup=False,
        )
    if write is not None:
        try:
            write_atomically(write, found.text().encode())
        except OSError as error:
            raise ConfigError(f"{write} cannot be written ({error.strerror})") from None
        _notes.print(f"Wrote {write}: {len(found.files)} files", soft_wrap=True, markup=False)


def _check_place(list_file: Path, folder: Path) -> None:
    """A list that the digest covers would make its folder another model."""
    if list_file.resolve().parent == folder.resolve() and is_digested(list_file.name):
        raise ConfigError(
            f"{list_file} would count as a file of the model itself; name it SHA256SUMS, or write it beside "
            "the folder"
        )
