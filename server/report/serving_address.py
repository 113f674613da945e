"""Where reports are served on this machine, for those who do not serve them."""

from __future__ import annotations

import http.client

_HOST = "127.0.0.1"
_TIMEOUT_S = 5.0


def page_address(port: int) -> str:
    """Return what a person gives their browser."""
    return f"http://{_HOST}:{port}/"


def answers(port: int) -> bool:
    """Whether reports are served there."""
    connection = http.client.HTTPConnection(_HOST, port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/?version")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
