"""From nothing to a run, by the commands that deploy/README.md names, with separate folders and processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli_w

from simulations.embedded import embedded_model_dir
from simulations.synthetic import SyntheticSpec, generate_hospitals, write_jsonl
from tests.integration.commands import Commands, Federation
from tests.integration.enrolled import allow
from tests.integration.sites import SMALL
from tests.ports import free_port

pytestmark = pytest.mark.integration


def test_a_coordinator_and_two_hospitals_from_nothing_to_a_run(tmp_path: Path) -> None:
    hospitals = generate_hospitals(
        SyntheticSpec(num_sites=2, patients_per_site=8, test_records=8, seed=3)
    )
    federation = Federation(tmp_path, tmp_path / "coordinator", tmp_path, free_port())
    model, out = embedded_model_dir(), tmp_path / "run"
    federation.run_file.write_text(
        tomli_w.dumps({**SMALL, "model.name": str(model), "train.rounds": 1})
    )

    with Commands(federation) as commands:

        def consilium(*words: str | Path) -> str:
            code, output = commands.run(*map(str, words), timeout_s=120)
            assert code == 0, output
            return output

        address = f"127.0.0.1:{federation.port}"
        consilium("server", "init", federation.coordinator, "--address", address)
        commands.up("server")
        commands.wait_for_superlink()
        for name, records in hospitals.sites.items():
            site = federation.site(name)
            made = consilium("client", "init", site, "--name", name, "--declared-size", "20")
            write_jsonl(records, site / "records.jsonl")
            allow(site, model)
            bundle = tmp_path / f"bundle-{name}.json"
            enrolled = consilium(
                *("server", "enroll", site / "enrolment.json", federation.coordinator),
                *("--out", bundle, "--yes"),
            )
            assert _fingerprint(made) in enrolled
            consilium("client", "join", bundle, "--site", site, "--yes")
            commands.up(name)
        said = consilium("server", "run", federation.run_file, federation.coordinator, "--out", out)

    assert str(out) in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["sites"] == sorted(hospitals.sites)
    assert [entry["replies"] for entry in summary["rounds"]] == [2]
    private = [federation.site(name) / "keys" / key for name in hospitals.sites
               for key in ("signing.pem", "node")]  # fmt: skip
    sent = b"".join(path.read_bytes() for path in tmp_path.glob("bundle-*.json"))
    assert all(path.read_bytes().splitlines()[1] not in sent for path in private)


def _fingerprint(output: str) -> str:
    return next(line.rpartition(": ")[2] for line in output.splitlines() if "Fingerprint" in line)
