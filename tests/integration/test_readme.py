"""The README's commands, run as they stand, print what it says they print.

Numbers may differ from machine to machine; words, order, files and table rows may not.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from simulations.synthetic import SyntheticSpec, generate_hospitals, write_jsonl

pytestmark = pytest.mark.integration

README = Path(__file__).parents[2] / "README.md"
_BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def _commands() -> list[tuple[str, str]]:
    """(command, expected output) of every console block, in order."""
    found = []
    for block in _BLOCK.findall(README.read_text(encoding="utf-8")):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    return found


def shape(output: str) -> list[str]:
    """Output without what may differ: digits, signs, spaces, bars, table borders."""
    lines = []
    for line in output.splitlines():
        words = re.sub(r"[━╸╺─│┃┏┓┗┛┡┩┳┻╇└┘┴├┤┼]", " ", line)
        words = re.sub(r"\b[0-9a-f]{8,}…?", "#", words)
        words = re.sub(r"[-+]?\d[\d:.,]*%?", "#", words)
        words = re.sub(r"# ?left ?(#|-:--)", "# left #", " ".join(words.split()))
        if words.strip("# "):
            lines.append(words)
    return lines


def _run(command: str, folder: Path) -> str:
    program, *arguments = shlex.split(command)
    assert program == "consilium"
    executable = Path(sys.executable).parent / "consilium"
    done = subprocess.run(
        [str(executable), *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("readme")
    hospitals = generate_hospitals(SyntheticSpec(num_sites=4, patients_per_site=60, seed=1))
    write_jsonl(
        [record for records in hospitals.sites.values() for record in records],
        home / "notes.jsonl",
    )
    return home


def test_the_first_run_on_ones_own_data_is_as_the_readme_says(folder: Path) -> None:
    commands = [pair for pair in _commands() if "demo" not in pair[0]]
    assert len(commands) >= 2
    for command, expected in commands:
        assert shape(_run(command, folder)) == shape(expected), command


def test_the_demo_is_as_the_readme_says_and_keeps_its_promise(folder: Path) -> None:
    """At least a quarter below the base, below the mean alone; DP keeps half of the gain."""
    ((command, expected),) = [pair for pair in _commands() if "demo" in pair[0]]

    output = _run(command, folder)

    assert shape(output) == shape(expected)
    with (folder / "runs" / "demo" / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    loss = {row["name"]: float(row["loss"]) for row in rows}
    alone = statistics.fmean(float(row["loss"]) for row in rows if row["kind"] == "alone")
    base, federated, private = loss["untouched base"], loss["federated"], loss["federated with DP"]
    assert federated <= 0.75 * base
    assert federated < alone
    assert base - private >= 0.5 * (base - federated)
    (dp_row,) = [row for row in rows if row["name"] == "federated with DP"]
    assert 0 < float(dp_row["epsilon"]) <= 8.0
