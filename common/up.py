"""What `consilium server up` and `client up` share: one in a folder, and nothing left of the one before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import EngineError
from common.locks import LockHeldError, hold_lock
from common.process_guard import Guard, end_marked, guarded_processes
from common.supervisor_state import read_supervisor_state


@contextmanager
def only_up(
    command: str, folder: Path, *, lock: Path, state_file: Path, home: Path
) -> Iterator[Guard]:
    """Give the guard of an `up` command's processes, once it is the only one in its folder.

    command, folder: for words. state_file: of the supervisor. home: FLWR_HOME, made if missing.
    Raises EngineError when another one runs there. Processes that one left behind which was killed a moment
    ago are ended first: they would hold port and database, or still train.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    held = hold_lock(lock)
    try:
        held.__enter__()
    except LockHeldError as error:
        raise EngineError(
            f"process {error.pid} is `{command}` for {folder} already; leave it, or end it first: kill "
            f"{error.pid}"
        ) from None
    try:
        earlier = read_supervisor_state(state_file)
        if earlier is not None:
            end_marked(earlier.mark)
        with guarded_processes(home / "guard.log") as guard:
            yield guard
    finally:
        held.__exit__(None, None, None)
