"""deploy/walkthrough.sh: a coordinator and three hospitals from nothing to an adapter, as the README says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from common.process_guard import guarded_processes
from tests.integration.test_readme import README, shape
from tests.ports import free_port

pytestmark = pytest.mark.integration

SCRIPT = README.parent / "deploy" / "walkthrough.sh"
SITES = ("harbour", "north", "st-anne")


def _marked() -> str:
    text = SCRIPT.read_text(encoding="utf-8")
    return text.partition("# --- README begins\n")[2].partition("# --- README ends")[0]


def _blocks(language: str) -> list[str]:
    readme = README.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", readme, flags=re.DOTALL)


def test_the_readme_shows_the_script_word_for_word() -> None:
    assert _marked() in _blocks("bash")


@pytest.mark.timeout(900)
def test_three_hospitals_from_nothing_to_an_adapter(tmp_path: Path) -> None:
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with guarded_processes(tmp_path / "guard.log") as guard:
        done = subprocess.run(
            [str(SCRIPT), str(tmp_path / "walk"), str(free_port())],
            env={**os.environ, **guard.mark, "PATH": search, "COLUMNS": "300", "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
    walk = tmp_path / "walk"
    logs = "\n".join(path.read_text() for path in walk.glob("*.log"))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:] + logs[-5000:]
    # Ended in good order, each by itself.
    assert logs.count("Stopped.") == 1 + len(SITES)

    run = walk / "coordinator" / "runs" / "study"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["sites"] == list(SITES)
    assert [one["replies"] for one in summary["rounds"]] == [3, 3, 3]
    assert summary["central"]["final"]["loss"] < 0.9 * summary["central"]["base"]["loss"]
    with safe_open(run / "adapter" / "adapter_model.safetensors", framework="np") as adapter:
        assert len(adapter.keys()) == 56
    # What the README shows of it.
    printed = _shape(done.stdout.replace(f"{walk}/", ""))
    (shown,) = [block for block in _blocks("text") if "Whole run: 3 rounds" in block]
    assert [line for line in _shape(shown) if line not in printed] == []


def _shape(output: str) -> list[str]:
    """As the README's other examples, and a span of time in whatever unit."""
    return [re.sub(r"# (s|min|h)\b", "# long", line) for line in shape(output)]
