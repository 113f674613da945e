"""The environment of Flower's processes."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from common.flower_process import flower_environment


@pytest.mark.parametrize(
    ("set_before", "kept"),
    [({}, []), ({"NO_PROXY": "a.org,.b"}, ["a.org", ".b"]), ({"NO_PROXY": "a", "no_proxy": "c"}, ["c"])],
)  # fmt: skip
def test_what_stays_on_the_machine_asks_no_proxy(
    monkeypatch: pytest.MonkeyPatch, set_before: dict[str, str], kept: list[str]
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in set_before.items():
        monkeypatch.setenv(name, value)
    # Nothing listens there.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    environment = flower_environment(Path("/home"))
    assert environment["no_proxy"] == environment["NO_PROXY"]
    assert environment["no_proxy"].split(",") == [*kept, "127.0.0.1", "localhost", "::1"]


def test_httpx_which_flower_uses_goes_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = {"HTTP_PROXY": "http://user:x@127.0.0.1:9"}
    for name, value in {**flower_environment(Path("/home")), **refused}.items():
        monkeypatch.setenv(name, value)
    used = []
    for host in ("127.0.0.1", "localhost", "[::1]", "consilium.example.org"):
        way: list[int] = []

        def note(event: str, info: dict[str, int], way: list[int] = way) -> None:
            if event == "connection.connect_tcp.started":
                way.append(info["port"])

        with httpx.Client(timeout=2) as client, pytest.raises(httpx.ConnectError, match="refused"):
            client.get(f"http://{host}:10", extensions={"trace": note})
        used += way
    assert used == [10, 10, 10, 9]
