"""Reports are served to this user's browser on this machine, read-only, and to nobody else."""

from __future__ import annotations

import http.client
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from starlette.applications import Starlette

import server.report.live
import server.report.serving
from common.locks import hold_lock
from server.coordinator import Coordinator
from server.history import History
from server.report.live import LiveReports
from server.report.serving import http_server, report_app
from server.report.watching import watched
from server.run_folder import RunFolder, run_lock
from server.runs import AskedRuns
from server.status import coordinator_status
from tests.unit.coordinator import ask_for_run, write_coordinator
from tests.unit.fake_runs import write_run


class Served:
    """An app on a port of loopback, as a process of it serves it."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(
        self, path: str, *, method: str = "GET", headers: dict[str, str] | None = None
    ) -> tuple[int, str, dict[str, str]]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as line:
            line.request(method, path, headers=headers or {})
            answer = line.getresponse()
            told = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, answer.read().decode(), told


@contextmanager
def _serving(*, run_dir: Path | None = None, runs: AskedRuns | None = None) -> Iterator[Served]:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        # Who asks before the server is there waits.
        listener.listen()
        port = listener.getsockname()[1]
        app: Starlette = report_app(port=port, run_dir=run_dir, runs=runs)
        serving = http_server(app)
        thread = threading.Thread(target=serving.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Served(port)
        finally:
            serving.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("served") / "run", rounds=2)


@pytest.fixture(scope="module")
def one_run(folder: Path) -> Iterator[Served]:
    with _serving(run_dir=folder) as served:
        yield served


def test_a_run_is_served_with_headers_that_let_it_do_nothing_else(one_run: Served) -> None:
    status, page, headers = one_run.ask("/")
    assert status == 200
    assert "Four sites trained together for 2 rounds" in page
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "'unsafe-inline'" not in headers["content-security-policy"].split("script-src")[1]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["cache-control"] == "no-store"
    assert "server" not in headers


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
def test_nothing_but_get_is_answered(one_run: Served, method: str) -> None:
    assert one_run.ask("/", method=method)[0] == 405


@pytest.mark.parametrize(
    "path",
    [
        "/run.toml",
        "/report.html",
        "/../run.toml",
        "/%2e%2e/run.toml",
        "//etc/passwd",
        "/run/x",
        "/run/",
    ],
)
def test_no_file_is_served_and_no_folder_listed(one_run: Served, path: str) -> None:
    status, page, _ = one_run.ask(path)
    assert status == 404
    assert "train" not in page


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1"]
)
def test_another_host_name_is_refused_as_a_rebound_one_is(one_run: Served, host: str) -> None:
    named = {"Host": host.format(port=one_run.port)}
    assert one_run.ask("/", headers=named)[0] == 421
    assert one_run.ask("/", headers={"Host": f"localhost:{one_run.port}"})[0] == 200


@pytest.mark.parametrize(
    ("site", "status"),
    [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)],
)
def test_what_another_page_asks_for_is_refused(one_run: Served, site: str, status: int) -> None:
    assert one_run.ask("/?version", headers={"Sec-Fetch-Site": site})[0] == status


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="needs Linux's own word")
@pytest.mark.parametrize("caller", [None, os.geteuid() + 1])
def test_another_user_of_this_machine_is_refused(
    one_run: Served, caller: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.report.serving, "calling_user", lambda *ends: caller)
    assert one_run.ask("/")[0] == 403


def test_a_page_is_drawn_again_when_its_run_has_gone_on_and_only_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "run", rounds=1, planned=3, end="")
    reports, drawn = LiveReports(), []
    draw = LiveReports._draw

    def counted(self: LiveReports, run_dir: Path, version: str) -> tuple[str, str]:
        drawn.append(version)
        return draw(self, run_dir, version)

    monkeypatch.setattr(LiveReports, "_draw", counted)
    first = reports.page(folder)
    assert reports.page(folder) == first
    assert drawn == [reports.version(folder)]
    assert f'data-version="{drawn[0]}"' in first
    History(folder / "history.jsonl").record("late", round=1, site="north", attempt=1)
    assert reports.version(folder) != drawn[0]
    reports.page(folder)
    with hold_lock(run_lock(folder)):
        assert "The run goes" in reports.page(folder)
    assert len(set(drawn)) == 3


def test_a_page_that_cannot_be_drawn_gives_way_to_the_last_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=1)
    reports = LiveReports()
    good = reports.page(folder)
    (folder / "attack.json").write_text("{")
    assert reports.page(folder) == good
    anew = LiveReports().page(folder)
    assert "The report cannot be drawn now" in anew
    assert "attack.json cannot be read" in anew
    assert "The run has not begun." in LiveReports().page(tmp_path / "not-yet")


def test_a_coordinator_lists_its_runs_and_serves_each_by_its_name_alone(tmp_path: Path) -> None:
    coordinator: Coordinator = write_coordinator(tmp_path / "coordinator")
    run: RunFolder = ask_for_run(coordinator, tmp_path / "pilot")
    secret = write_run(tmp_path / "secret")
    with _serving(runs=AskedRuns(coordinator.launches)) as served:
        _, page, _ = served.ask("/")
        assert f'href="/run/{run.run_uid}">pilot</a>' in page
        before = served.ask("/?version")[1]
        assert served.ask(f"/run/{run.run_uid}")[0] == 200
        assert served.ask(f"/run/{secret.name}")[0] == 404
        assert served.ask("/run/..%2Fsecret")[0] == 404
        History(run.history).record("run-started", run=run.run_uid, rounds=4)
        assert served.ask("/?version")[1] != before


def test_a_run_is_watched_by_a_process_that_ends_with_it(folder: Path) -> None:
    with watched(folder) as address:
        host, _, port = address.removeprefix("http://").rstrip("/").partition(":")
        assert host == "127.0.0.1"
        assert Served(int(port)).ask("/?version")[0] == 200
    with pytest.raises(ConnectionRefusedError, match="refused"):
        Served(int(port)).ask("/")


def test_status_says_where_reports_are_served_while_up_runs(tmp_path: Path) -> None:
    coordinator = write_coordinator(tmp_path / "coordinator")
    coordinator.watch_state.write_text('{"port": 8123}')
    assert coordinator_status(coordinator).reports == ""
    with hold_lock(coordinator.up_lock):
        assert coordinator_status(coordinator).reports == "http://127.0.0.1:8123/"
        coordinator.watch_state.write_text("{")
        assert coordinator_status(coordinator).reports == ""
