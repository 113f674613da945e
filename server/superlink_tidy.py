"""Making the SuperLink's database small again while no SuperLink runs: python -m server.superlink_tidy FILE

Flower deletes the messages of a run that is over when somebody next asks about it, and SQLite keeps the
space: the file stays as large as it ever was, about two and a half adapters for each site of the largest
round. A process of its own, because Flower's state loads much that `server up` would hold for weeks.
"""

from __future__ import annotations

import logging
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from common.errors import EngineError

logger = logging.getLogger(__name__)

# A database of many GB is rewritten in this time on a slow disk.
_TIMEOUT_S = 900.0
# Less is not worth rewriting the file.
_WORTHWHILE_BYTES = 1 << 20


def tidy_apart(database: Path, *, environment: Mapping[str, str]) -> None:
    """Tidy a database in a process of its own, and wait for it; what goes wrong costs only the space.

    environment: of that process, with the mark of the guard that ends it if we are killed.
    """
    if not database.is_file():
        return
    before = _size_bytes(database)
    command = [sys.executable, "-m", "server.superlink_tidy", str(database)]
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
        trouble = done.stdout.strip()[-500:] if done.returncode else ""
    except (subprocess.TimeoutExpired, OSError) as error:
        trouble = str(error)
    if trouble:
        logger.warning("%s could not be made small again: %s", database, trouble)
        return
    after = _size_bytes(database)
    if after < before:
        logger.info("%s: %d bytes, and was %d", database, after, before)


def tidy(database: Path) -> None:
    """Delete what runs left, and give the space back. No SuperLink may run, and nothing that worked for one.

    A run that Flower thinks to go is stopped: what ran it is dead. Its row stays, as that of every run.
    Raises EngineError when SQLite refuses, for want of space say.
    """
    # Only here: much that whoever calls `tidy_apart` does not need.
    from flwr.common.constant import Status
    from flwr.server.superlink.linkstate import LinkStateFactory
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.superlink.federation import NoOpFederationManager

    store = ObjectStoreFactory(str(database))
    state = LinkStateFactory(str(database), NoOpFederationManager(), store).state()
    for run in state.get_run_info():
        if run.status.status != Status.FINISHED:
            state.stop_run(run.run_id)
        state.cleanup_run(run.run_id)
    try:
        with closing(sqlite3.connect(database, isolation_level=None)) as connection:
            if _free_bytes(connection) >= _WORTHWHILE_BYTES:
                connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.Error as error:
        raise EngineError(f"{database} could not be rewritten ({error})") from None


def _free_bytes(connection: sqlite3.Connection) -> int:
    names = ("freelist_count", "page_size")
    count, size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
    return int(count) * int(size)


def _size_bytes(database: Path) -> int:
    """With what SQLite keeps beside it."""
    return sum(path.stat().st_size for path in database.parent.glob(f"{database.name}*"))


def main() -> None:
    """Tidy the database that this process's first argument names."""
    try:
        tidy(Path(sys.argv[1]))
    except EngineError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
