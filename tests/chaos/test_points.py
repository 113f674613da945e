"""The named points are all there, in the processes that they are meant for, and kill as they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.points import POINTS, VARIABLE, arm, disarm, environment, kills

pytestmark = pytest.mark.chaos

_ROOT = Path(__file__).resolve().parents[2]
_KILLED = -9


def _python(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment(folder), "OMP_NUM_THREADS": "1"},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_every_points_target_is_there_and_is_wrapped_when_its_module_is_imported(
    tmp_path: Path,
) -> None:
    modules = sorted({point.module for point in POINTS.values()})
    done = _python(tmp_path, f"import {', '.join(modules)}")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "installed")) == sorted(POINTS)


def test_a_point_whose_target_is_gone_ends_the_process_loudly(tmp_path: Path) -> None:
    """Else a renamed function would leave a point that nobody ever reaches."""
    broken = tmp_path / "broken"
    (broken / "server").mkdir(parents=True)
    for name in ("__init__", "rounds", "lowrank", "aggregation"):
        (broken / "server" / f"{name}.py").write_text("METHODS = {}\nclass Federation: pass\n")
    for module, error in (
        ("rounds", "KeyError: 'select'"),
        ("lowrank", "AttributeError: .*truncated_svd"),
        ("aggregation", "AttributeError: .*merge"),
    ):
        code = f"import sys; sys.path.insert(0, sys.argv[1]); import server.{module}"
        done = _python(tmp_path / "chaos", code, str(broken))
        assert done.returncode == 1
        assert re.search(error, done.stderr), done.stderr


def test_nothing_is_wrapped_without_the_variable(tmp_path: Path) -> None:
    env = {**os.environ, **environment(tmp_path)}
    del env[VARIABLE]
    code = (
        "import sys\n"
        "loaded = [*sys.meta_path, *sys.modules]\n"
        "assert not any(one in repr(f) for one in ('wrapping', 'points') for f in loaded)"
    )
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=240)


@pytest.fixture
def child(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that reaches `configure` once a second line, and says so when it lives on."""
    code = (
        "import sys, types, server_stub\n"
        "for line in sys.stdin:\n"
        "    server_stub.reach(line.strip())\n"
        "    print('alive', flush=True)\n"
    )
    (tmp_path / "server_stub.py").write_text(
        "import os, sys\n"
        "points = sys.modules['consilium_points']\n"
        "hit = points._Hit(os.environ[points.VARIABLE], 'configure')\n"
        "def reach(site): hit(site=site)\n"
    )
    chaos = environment(tmp_path / "chaos")
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **chaos, "PYTHONPATH": f"{chaos['PYTHONPATH']}:{tmp_path}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def _lives_on(child: subprocess.Popen[str], site: str = "") -> bool:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(f"{site}\n")
    child.stdin.flush()
    return child.stdout.readline() == "alive\n"


def test_a_process_lives_on_until_its_point_is_armed_and_then_says_how_it_died(
    child: subprocess.Popen[str], tmp_path: Path
) -> None:
    chaos = tmp_path / "chaos"
    assert _lives_on(child)
    arm(chaos, "configure")
    before = time.time()
    assert not _lives_on(child, "north")
    assert child.wait(120) == _KILLED
    (death,) = kills(chaos, "configure")
    assert (death["pid"], death["site"]) == (child.pid, "north")
    assert before <= death["time"] <= time.time()
    assert not disarm(chaos, "configure"), "an arming kills one process"


def test_an_arming_may_be_narrowed_to_a_site_and_let_some_hits_pass(
    child: subprocess.Popen[str], tmp_path: Path
) -> None:
    chaos = tmp_path / "chaos"
    arm(chaos, "configure", site="north", skip=2)
    for site in ("south", "south", "south", "north", "south", "north"):
        assert _lives_on(child, site), "two of north pass, and any of south"
    assert not _lives_on(child, "north")
    assert child.wait(120) == _KILLED


def test_an_arming_that_is_taken_back_kills_nobody(
    child: subprocess.Popen[str], tmp_path: Path
) -> None:
    chaos = tmp_path / "chaos"
    arm(chaos, "configure")
    assert disarm(chaos, "configure")
    assert _lives_on(child)
    assert kills(chaos, "configure") == []
    with pytest.raises(KeyError, match="'nowhere' is none of configure"):
        arm(chaos, "nowhere")


def test_an_upload_stops_between_its_first_object_and_its_last(tmp_path: Path) -> None:
    """With Flower's own function, which sends with two threads."""
    code = (
        "import sys, time\n"
        "from flwr.supernode import start_client_internal as flower\n"
        "def push(object_id, content):\n"
        "    time.sleep(0.2 if object_id != 'a' else 0)\n"
        "    sys.stdout.write(object_id + '\\n')\n"
        "    sys.stdout.flush()\n"
        "ids = sys.argv[1]\n"
        "flower.push_object_contents_from_iterable(((i, b'x') for i in ids), push_object_fn=push)\n"
    )
    arm(tmp_path, "mid-upload")
    small = _python(tmp_path, code, "abc")
    assert (small.returncode, sorted(small.stdout.split())) == (0, [*"abc"]), small.stderr
    done = _python(tmp_path, code, "abcdef")
    assert done.returncode == _KILLED, done.stderr
    assert done.stdout.split()[:1] == ["a"]
    assert len(done.stdout.split()) < 3
    assert kills(tmp_path, "mid-upload")[0]["objects"] == 6
    assert json.loads((tmp_path / "killed" / "mid-upload-1.json").read_text())["size_bytes"] == 6


@pytest.mark.parametrize(
    ("point", "entries"), [("before-ledger-fsync", 0), ("after-ledger-fsync", 1)]
)
def test_a_charge_is_undone_just_before_its_commit_and_stands_just_after(
    point: str, entries: int, tmp_path: Path
) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from client.ledger_entries import LedgerRow, reservation\n"
        "from client.ledger_file import LedgerFile\n"
        "from common.privacy import GaussianSteps\n"
        "ledger = LedgerFile(Path(sys.argv[1]))\n"
        "row = LedgerRow('a' * 64, 'run', 'notes', 'record', 1, GaussianSteps(1.0, 0.1, 2))\n"
        "print(ledger.state().head.count, flush=True)\n"
        "if len(sys.argv) > 2:\n"
        "    with ledger.transaction() as opened: pass\n"
        "    with ledger.transaction() as opened: opened.append([reservation(row, at=1)])\n"
    )
    path = tmp_path / "north" / "state" / "ledger.sqlite"
    chaos = tmp_path / "chaos"
    arm(chaos, point, site="north")
    done = _python(chaos, code, str(path), "charge")
    assert (done.returncode, done.stdout) == (_KILLED, "0\n"), done.stderr
    assert _python(chaos, code, str(path)).stdout == f"{entries}\n"
