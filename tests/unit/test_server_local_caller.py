"""Whose process connected, as the system says it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from server.local_caller import calling_user

NOBODY = 65534


@contextmanager
def _connected(
    listens: str, connects: str, *, user: int | None = None
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Give the two ends of a connection, that of `user` first. listens, connects: IP addresses."""
    families = [socket.AF_INET6 if ":" in host else socket.AF_INET for host in (connects, listens)]
    with socket.socket(families[0]) as client, socket.socket(families[1]) as listener:
        if families[1] == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if user is not None:
            os.fchown(client.fileno(), user, -1)
        listener.bind((listens, 0))
        listener.listen()
        client.connect((connects, listener.getsockname()[1]))
        accepted, _ = listener.accept()
        with accepted:
            yield client, accepted


def _asked(accepted: socket.socket) -> int | None:
    """As a server asks: by what it knows of the connection."""
    return calling_user(accepted.getpeername()[:2], accepted.getsockname()[:2])


@pytest.mark.parametrize(
    ("listens", "connects"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("::", "127.0.0.1"),
        ("::", "::ffff:127.0.0.1"),
        ("0.0.0.0", "::ffff:127.0.0.1"),
    ],
)
def test_the_user_of_a_connection_is_found_however_it_is_spelt(listens: str, connects: str) -> None:
    if not _speaks_ipv6() and ":" in listens + connects:
        pytest.skip("no IPv6 here")
    with _connected(listens, connects) as (_, accepted):
        assert _asked(accepted) == os.geteuid()


def _speaks_ipv6() -> bool:
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


def test_another_users_connection_is_his() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a socket to somebody else")
    with _connected("127.0.0.1", "127.0.0.1", user=NOBODY) as (_, accepted):
        assert _asked(accepted) == NOBODY


def test_a_connection_that_its_process_has_closed_is_nobodys() -> None:
    """The kernel names root then, and anybody can close what he opened."""
    with _connected("127.0.0.1", "127.0.0.1") as (client, accepted):
        client.shutdown(socket.SHUT_WR)
        assert _asked(accepted) is None
        client.close()
        assert _asked(accepted) is None


def test_a_connection_that_is_not_there_is_nobodys() -> None:
    assert calling_user(("127.0.0.1", 1), ("127.0.0.1", 2)) is None
    assert calling_user(("192.0.2.1", 1), ("127.0.0.1", 2)) is None
