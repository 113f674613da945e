"""nginx before a coordinator, with the configuration that deploy/edge ships."""

from __future__ import annotations

import getpass
import shutil
import string
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # ships no types
import pytest

from common.flower_process import http_answers

SHIPPED = Path(__file__).parents[2] / "deploy" / "edge" / "nginx.conf"
# Debian's own has more of the same; these are what a test must place in a folder of its own.
_MAIN = """
daemon off;
user {user};
worker_processes 2;
pid {folder}/nginx.pid;
error_log {folder}/nginx-error.log info;
events {{ worker_connections 768; }}
http {{
    log_format sizes '$status $request_length $uri';
    access_log {folder}/nginx-access.log sizes;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/consilium.conf;
}}
"""


def render_edge(*, port: int, name: str, tls: Path, superlink: str) -> str:
    """The shipped configuration with a coordinator's values, as envsubst would put them in."""
    values = {"EDGE_PORT": port, "EDGE_NAME": name, "EDGE_TLS": tls, "EDGE_SUPERLINK": superlink}
    return Only(SHIPPED.read_text()).safe_substitute(values)


class Only(string.Template):
    """${NAME} is a value of ours; $name is nginx's own."""

    pattern = (
        r"\$(?:(?P<escaped>(?!))|(?P<named>(?!))|\{(?P<braced>EDGE_[A-Z]+)\}|(?P<invalid>(?!)))"
    )


@contextmanager
def running_edge(
    folder: Path,
    *,
    port: int,
    name: str,
    tls: Path,
    superlink: str,
    change: Callable[[str], str] = lambda text: text,
) -> Iterator[psutil.Process]:
    """Give the process of an nginx that has begun to listen; skip without nginx.

    change: what a test does to the configuration before it is used.
    """
    executable = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if executable is None:
        pytest.skip("no nginx here: apt-get install nginx-light")
    folder.mkdir()
    content = render_edge(port=port, name=name, tls=tls, superlink=superlink)
    (folder / "consilium.conf").write_text(change(content))
    main = folder / "nginx.conf"
    main.write_text(_MAIN.format(folder=folder, user=getpass.getuser()))
    command = [
        executable,
        "-p",
        str(folder),
        "-e",
        str(folder / "nginx-error.log"),
        "-c",
        str(main),
    ]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 120
            while not http_answers("127.0.0.1", port, tls=True):
                assert process.poll() is None, (folder / "nginx-error.log").read_text()
                assert time.monotonic() < deadline, (folder / "nginx-error.log").read_text()
                time.sleep(0.1)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
