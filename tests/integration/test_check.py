"""`consilium client check` against a real SuperLink, and a hospital that gets out by a proxy alone."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from client.check_network import reach_coordinator
from client.site_config import load_site_config
from server import certificates
from server.certificates import make_authority
from tests.connect_proxy import connect_proxy
from tests.integration.certificates import write_server_certificates
from tests.integration.commands import CONSILIUM, Commands, Federation, write_federation
from tests.integration.network import COORDINATOR, hospital_network, ip
from tests.unit.ready_site import edited

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

# Of this machine, and on no cable: who is elsewhere needs somebody here to connect for him.
_OUT_OF_REACH = f"10.214.{os.getpid() % 250}.1"
_PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


def _site(federation: Federation) -> Path:
    """A site's folder with the modes that `client init` gives it, and no room for a delta of 0.1."""
    site = federation.site(federation.sites[0])
    edited(site, policy={"max-delta": 1e-5}, device={"name": "cpu"})
    (site / "site.toml").chmod(0o600)
    for folder in (site, site / "keys", site / "state"):
        if folder.is_dir():
            folder.chmod(0o700)
    return site


def _checks(output: str) -> dict[str, dict[str, Any]]:
    # What the command says to people stands behind it.
    found, _ = json.JSONDecoder().raw_decode(output)
    return {check["name"]: check for check in found["checks"]}


def _said(site: Path) -> str:
    (line,) = reach_coordinator(load_site_config(site)).lines
    assert (line.name, line.state) == ("coordinator", "fail")
    return line.detail


def test_a_superlink_is_known_by_its_certificate_and_told_from_every_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in _PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    federation = write_federation(tmp_path)
    site, tls = _site(federation), federation.coordinator / "tls"
    with Commands(federation) as commands:
        commands.up("server")
        commands.wait_for_superlink()
        code, output = commands.run("client", "check", "--site", str(site), "--json")
        checks = _checks(output)
        assert [name for name, check in checks.items() if check["state"] == "fail"] == [], output
        assert code == 0
        assert "answers directly, TLSv1.3" in checks["coordinator"]["detail"]
        assert checks["clock"]["detail"] == "within 2 s of the coordinator's"

        ca = (site / "coordinator" / "ca.crt").read_bytes()
        (site / "coordinator" / "ca.crt").write_bytes(make_authority("Another CA").certificate)
        assert "is vouched for by 'CN=Consilium test CA', whom" in _said(site)
        (site / "coordinator" / "ca.crt").write_bytes(ca)

        commands.ups["server"].terminate()
        assert commands.ups["server"].wait(timeout=180) == 0
        assert "refused the connection: nothing listens there" in _said(site)
        code, output = commands.run("client", "check", "--site", str(site))
        assert code == 8, output
        assert "error (preflight): failed: coordinator;" in output

        monkeypatch.setattr(certificates, "_SERVER_DAYS", -0.5)
        write_server_certificates(tls)
        (site / "coordinator" / "ca.crt").write_bytes((tls / "ca.crt").read_bytes())
        commands.up("server")
        commands.wait_for_superlink()
        assert "has expired" in _said(site)


@contextmanager
def _address_on_no_cable() -> Iterator[str]:
    ip("addr", "add", f"{_OUT_OF_REACH}/32", "dev", "lo")
    try:
        yield _OUT_OF_REACH
    finally:
        ip("addr", "del", f"{_OUT_OF_REACH}/32", "dev", "lo")


def test_a_hospital_that_gets_out_by_a_proxy_alone_connects_and_trains(tmp_path: Path) -> None:
    """Both variables are set, as they are in hospitals: what stays on its machine asks no proxy."""
    with hospital_network() as namespace, _address_on_no_cable() as address:
        settings = {"train.rounds": 1, "federation.min-sites": 1}
        federation = write_federation(tmp_path, settings, host=address)
        name, site = federation.sites[0], _site(federation)
        with Commands(federation) as commands, connect_proxy(COORDINATOR) as proxy:
            commands.up("server")
            commands.wait_for_superlink()
            commands.enrol(name)
            there = ["ip", "netns", "exec", namespace]
            proxied = [
                *(*there, "env"),
                *(
                    f"{variable}=http://{COORDINATOR}:{proxy.port}"
                    for variable in _PROXY_VARIABLES[:2]
                ),
            ]
            check = [CONSILIUM, "client", "check", "--site", str(site), "--json"]

            def checked(prefix: list[str]) -> str:
                done = subprocess.run(
                    [*prefix, *check], capture_output=True, text=True, timeout=240
                )
                detail: str = _checks(done.stdout)["coordinator"]["detail"]
                return detail

            assert (
                f"{address}:{federation.port} cannot be reached (Network is unreachable)"
                in checked(there)
            )
            assert proxy.asked == []
            assert f"through the proxy {COORDINATOR}:{proxy.port}" in checked(proxied)

            commands.prefix[name] = proxied
            commands.up(name)
            commands.wait_until(
                lambda: (commands.status()["nodes"] or [{}])[0].get("online"), "online"
            )
            code, output = commands.run(
                *("server", "run", str(federation.run_file), str(federation.coordinator)),
                *("--out", str(tmp_path / "run")),
                timeout_s=150,
            )
            assert code == 0, output + commands.tails()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["sites"] == [name]
    # All that was asked of the proxy is the coordinator.
    assert set(proxy.asked) == {f"CONNECT {address}:{federation.port} HTTP/1.1"}
