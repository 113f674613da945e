"""The SuperLink's database where Flower has no command for it: which node has which key.

Read while a SuperLink runs, changed only while none does. Flower 1.41: SQLite; `node.public_key` is PEM,
`node.node_id` an unsigned 64-bit number kept as a signed one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)
from flwr.supercore.constant import NodeStatus

from common.errors import EngineError

_BUSY_S = 30.0


def registered_nodes(database: Path, node_keys: Iterable[str]) -> dict[str, int]:
    """Return the node of each key that the SuperLink would let in now.

    node_keys: in OpenSSH form. Returns node key -> node id. Raises EngineError when the file is no
    SuperLink's.
    """
    wanted = {_pem(key): key for key in node_keys if key}
    if not wanted or not database.is_file():
        return {}
    with open_database(database) as connection:
        listed = connection.execute(
            "SELECT public_key, node_id FROM node WHERE status != ?", (NodeStatus.UNREGISTERED,)
        )
        return {wanted[key]: node % (1 << 64) for key, node in listed if key in wanted}


def strike_nodes(database: Path, node_keys: Iterable[str]) -> int:
    """Unregister the nodes with these keys while no SuperLink runs, and return how many there were."""
    nodes = registered_nodes(database, node_keys)
    if not nodes:
        return 0
    now = datetime.now(UTC).isoformat()
    with open_database(database) as connection:
        connection.executemany(
            "UPDATE node SET status = ?, unregistered_at = ? WHERE public_key = ?",
            [(NodeStatus.UNREGISTERED, now, _pem(key)) for key in nodes],
        )
    return len(nodes)


@contextmanager
def open_database(database: Path) -> Iterator[sqlite3.Connection]:
    """Give a connection whose changes hold once it is left. Raises EngineError for what SQLite refuses."""
    try:
        with closing(sqlite3.connect(database, timeout=_BUSY_S)) as connection, connection:
            yield connection
    except sqlite3.Error as error:
        raise EngineError(
            f"{database} cannot be used as the SuperLink's database ({error}); if that stays so, restore it "
            "from a backup"
        ) from None


def _pem(node_key: str) -> bytes:
    key = load_ssh_public_key(node_key.encode())
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
