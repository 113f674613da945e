"""A machine of its own, as far as systemd can tell: the shipped units, run by systemd itself, in namespaces.

with Machine(folder) as machine:
    machine.install("consilium-agent.service")
    machine.write("/etc/x", "content")
    machine.boot("consilium-agent.service", until=lambda: (machine.out / "done").exists())
    machine.run("systemctl", "stop", "consilium-agent")

Its root is this machine's, with a layer above that takes what is written; users, processes, network and /run
are its own. Nothing of it is left afterwards.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil  # type: ignore[import-untyped]  # ships no types
import pytest

SHIPPED = Path(__file__).parents[2] / "deploy" / "systemd"
_PROJECT = Path(__file__).parents[2]
_SYSTEMD = Path("/lib/systemd/systemd")
_NAMESPACES = ("-m", "-p", "-n", "-u", "-i", "-C")
_COMMANDS = ("consilium", "flower-superlink", "flower-superexec", "flower-supernode", "flwr",
             "flwr-serverapp", "flwr-clientapp")  # fmt: skip
# What a container manager does before it starts systemd. $1 the test's folder, $2 python, $3 its packages,
# $4 the project, of which pip would install no more than the packages.
_BOOT = """
set -eu
here=$1
mount --make-rprivate /
mount -t tmpfs tmpfs "$here/layer"
mkdir "$here/layer/up" "$here/layer/work" "$here/layer/root"
root=$here/layer/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$here/layer/up,workdir=$here/layer/work" "$root"
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,ro,bind "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs tmpfs "$root/dev"
for device in null:3 zero:5 full:7 random:8 urandom:9; do
  mknod -m 666 "$root/dev/${device%:*}" c 1 "${device#*:}"
done
mknod -m 666 "$root/dev/tty" c 5 0
mkdir "$root/dev/shm" "$root/dev/pts" "$root/dev/mqueue" "$root/dev/hugepages"
mount -t devpts devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
mount -t tmpfs tmpfs "$root/dev/shm"
for folder in run tmp var/tmp; do mount -t tmpfs -o mode=1777 tmpfs "$root/$folder"; done
mkdir -p "$root/out" "$root/opt/python" "$root/opt/consilium/packages" "$root/opt/consilium/src"
mount --bind "$here/out" "$root/out"
mount --bind -o ro "$2" "$root/opt/python"
mount --bind -o ro "$3" "$root/opt/consilium/packages"
for package in common client server simulations; do
  mkdir "$root/opt/consilium/src/$package"
  mount --bind -o ro "$4/$package" "$root/opt/consilium/src/$package"
done
rm -rf "$root"/etc/systemd/system/*.wants "$root"/var/lib/consilium-*
cp -a "$here/files/." "$root/"
chroot "$root" systemd-sysusers
chroot "$root" systemd-tmpfiles --create /etc/tmpfiles.d/consilium.conf
ip link set lo up
ip link add outside type veth peer name beyond
ip link set outside up
mkdir "$root/before"
cd "$root"
pivot_root . before
umount -l /before
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin \\
  /lib/systemd/systemd --system --unit=test.target --log-target=console --show-status=no </dev/null
"""
PYTHON = """\
#!/bin/sh
export PYTHONPATH=/opt/consilium/src:/opt/consilium/packages PATH=/opt/consilium/bin:/usr/bin:/bin
export LD_LIBRARY_PATH=/opt/python/lib OMP_NUM_THREADS=1
exec /opt/python/bin/python3"""
_ENTRY = """\
{python} -c 'import sys
from importlib.metadata import entry_points
sys.argv[0] = "{name}"
sys.exit(entry_points(group="console_scripts", name="{name}")["{name}"].load()())' "$@"
"""


class Machine:
    """What is written is there before anything starts; what units write into /out is in `out`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self._files = folder / "files"
        self._cgroup = _cgroup()
        self._booted: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        for folder in (self.out, self._files, self.folder / "layer"):
            folder.mkdir(parents=True)
        # Owned as in a root; what is below gets its owners by the shipped files.
        for name in _COMMANDS:
            self.write(
                f"/opt/consilium/bin/{name}", _ENTRY.format(python=PYTHON, name=name), mode=0o755
            )
        for target in ("sysinit", "basic"):
            self.write(f"/etc/systemd/system/{target}.target", f"[Unit]\nDescription={target}\n")
        for unit in (
            "journald.service",
            "journald.socket",
            "journald-dev-log.socket",
            "udevd.service",
        ):
            self.link(f"/etc/systemd/system/systemd-{unit}", "/dev/null")
        for name in ("sysusers", "tmpfiles"):
            shipped = (SHIPPED / f"{name}-hospital.conf").read_text()
            self.write(f"/etc/{name}.d/consilium.conf", shipped)
        self.write(
            "/etc/sysusers.d/consilium-coordinator.conf",
            (SHIPPED / "sysusers-coordinator.conf").read_text(),
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._booted is not None:
            self._booted.kill()
            self._booted.wait()
        # With the first process of a process namespace ends every other.
        (self._cgroup / "cgroup.kill").write_text("1")
        for _ in range(50):
            if "populated 0" in (self._cgroup / "cgroup.events").read_text():
                break
            time.sleep(0.1)
        for folder, _, _ in os.walk(self._cgroup, topdown=False):
            os.rmdir(folder)

    def write(self, path: str, content: str, *, mode: int = 0o644) -> None:
        """Place a file of root's."""
        place = self._files / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content)
        place.chmod(mode)

    def link(self, path: str, target: str) -> None:
        place = self._files / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)

    def copy(self, source: Path, path: str) -> None:
        """Place a folder as it is."""
        shutil.copytree(source, self._files / path.lstrip("/"), symlinks=True)

    def install(self, shipped: str, name: str | None = None, **changes: str) -> None:
        """Place a unit as it is shipped, under its own or another name.

        changes: directives of [Service] that a test sets anew, as a drop-in, by which systemd itself does it.
        """
        name = name or shipped
        self.write(f"/etc/systemd/system/{name}", (SHIPPED / shipped).read_text())
        if changes:
            lines = [f"{key}=\n{key}={value}" if key == "ExecStart" else f"{key}={value}"
                     for key, value in changes.items()]  # fmt: skip
            self.drop_in(name, "test", "[Service]\n" + "\n".join(lines) + "\n")

    def drop_in(self, unit: str, name: str, content: str) -> None:
        self.write(f"/etc/systemd/system/{unit}.d/{name}.conf", content)

    def boot(
        self, *units: str, until: Callable[[], bool] | None = None, timeout_s: float = 180
    ) -> None:
        """Start these units, and return when the condition holds; without one, when commands can be run."""
        until = until or self._takes_commands
        wants = " ".join(units)
        self.write(
            "/etc/systemd/system/test.target",
            f"[Unit]\nDescription=test\nWants={wants}\nRequires=basic.target\nAfter=basic.target\n",
        )
        script = self.folder / "boot.sh"
        script.write_text(_BOOT)
        packages = sysconfig.get_paths()["purelib"]
        inner = ["sh", str(script), str(self.folder), sys.base_prefix, packages, str(_PROJECT)]
        command = (
            f"echo $$ > {shlex.quote(str(self._cgroup / 'cgroup.procs'))} && exec "
            + shlex.join(["unshare", *_NAMESPACES, "--fork", "--kill-child=SIGKILL", *inner])
        )
        with (self.folder / "console.log").open("wb") as console:
            self._booted = subprocess.Popen(["sh", "-c", command], stdout=console, stderr=console)
        deadline = time.monotonic() + timeout_s
        while not until():
            assert self._booted.poll() is None, self.console()
            assert time.monotonic() < deadline, self.console()
            time.sleep(0.2)

    @property
    def root(self) -> Path:
        """Its file system, while it runs."""
        return Path(f"/proc/{self._init_pid()}/root")

    def start(self, *command: str, user: str = "root") -> subprocess.Popen[str]:
        """Start a command in it, as one of its users; its output is in a pipe."""
        enter = ["nsenter", f"--target={self._init_pid()}", *_NAMESPACES]
        who = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
        environment = ["env", "-i", "PATH=/opt/consilium/bin:/usr/sbin:/usr/bin:/bin",
                       "COLUMNS=120", "HOME=/tmp"]  # fmt: skip
        return subprocess.Popen(
            [*enter, *who, *environment, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, user: str = "root", timeout_s: float = 240) -> str:
        """Run a command in it, which must succeed, and return what it said."""
        with self.start(*command, user=user) as process:
            try:
                said, _ = process.communicate(timeout=timeout_s)
            finally:
                process.kill()
        assert process.returncode == 0, f"{command}: {said}\n{self.console()}"
        return said

    def _takes_commands(self) -> bool:
        return (
            bool(self._children())
            and self._children()[0].name() == "systemd"
            and (self.root / "run/systemd/private").exists()
        )

    def _init_pid(self) -> int:
        return int(self._children()[0].pid)

    def _children(self) -> list[psutil.Process]:
        assert self._booted is not None
        # It is unshare, and its one child the first process of the new namespaces.
        return list(psutil.Process(self._booted.pid).children())

    def console(self) -> str:
        """What systemd said, and what units wrote."""
        parts = [(self.folder / "console.log").read_text(errors="replace")[-4000:]]
        for path in sorted(self.out.iterdir()):
            parts.append(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}")
        return "\n".join(parts)


def _cgroup() -> Path:
    """A control group of the test's own; skip where systemd cannot be run beside what runs."""
    if os.geteuid() != 0:
        pytest.skip("not root: users, namespaces and systemd are")
    if not _SYSTEMD.exists():
        pytest.skip("no systemd here: apt-get install systemd")
    if not Path("/usr/bin/python3").exists():
        pytest.skip("no /usr/bin/python3, which the probes run with")
    tried = subprocess.run(
        ["unshare", *_NAMESPACES, "--fork", "true"], capture_output=True, check=False
    )
    if tried.returncode != 0:
        pytest.skip(f"no right to make namespaces here: {tried.stderr.decode().strip()}")
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    for _, place, kind, *_ in mounts:
        if kind == "cgroup2":
            group = Path(place) / f"consilium-test-{os.getpid()}-{time.monotonic_ns()}"
            try:
                group.mkdir()
            except OSError as error:
                pytest.skip(f"no right to make a control group: {error}")
            return group
    pytest.skip("no cgroup2 mounted here")
