"""A disk that is full in the middle of a run, at the coordinator and at a hospital: a real, small tmpfs.

Whatever could not be written then, the run ends with a word on what to do, nothing is damaged, and it goes
on once there is space: to the very bit that it would have reached without.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from client.ledger import Ledger
from client.one_output import OneOutput
from client.site import Site
from common.audit_log import verify_audit_log
from common.errors import DiskError, QuorumError
from common.signing import SigningKey
from server.history import read_events
from simulations.run import run_simulation
from tests.chaos.disks import full, small_disk
from tests.unit.scenarios import interrupt_after, run, simulation, site_names, write_scenario

pytestmark = pytest.mark.chaos

# One attempt: the pauses between more would only cost the test its time.
CHANGES = {"federation__max_retries": 0, "train__rounds": 3}


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    return write_scenario(tmp_path_factory.mktemp("scenario") / "two", tiny_model_dir)


@pytest.fixture(scope="module")
def undisturbed(scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The exported adapter of the same run with space enough."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run(scenario, out, **CHANGES)
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def begun(scenario: Path, tmp_path: Path) -> Path:
    """A run that was interrupted after its first round."""
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_simulation(simulation(scenario, out, **CHANGES), listener=interrupt_after(1))
    return out


# From nothing at all to nearly enough: each stops it somewhere else.
@pytest.mark.parametrize("leave_bytes", [0, 4096, 8192, 16384, 32768, 65536])
def test_a_full_disk_at_the_coordinator_damages_nothing_and_the_run_goes_on(
    leave_bytes: int, scenario: Path, undisturbed: bytes, begun: Path
) -> None:
    # The hospitals' disks are their own.
    sites, elsewhere = begun / "simulation" / "sites", begun.with_name("sites")
    shutil.move(sites, elsewhere)
    sites.symlink_to(elsewhere)
    with small_disk(begun):
        with (
            full(begun, leave_bytes=leave_bytes),
            pytest.raises(DiskError, match=r"the disk of .* is full .*continue with --resume"),
        ):
            run(scenario, begun, resume=True, **CHANGES)
        _check_goes_on(scenario, begun, undisturbed)


@pytest.mark.parametrize("leave_bytes", [0, 4096, 16384, 65536, 1 << 20])
def test_a_full_disk_at_a_site_damages_nothing_and_the_run_goes_on(
    leave_bytes: int, scenario: Path, undisturbed: bytes, begun: Path
) -> None:
    name = site_names(scenario)[0]
    state = begun / "simulation" / "sites" / name / "state"
    with small_disk(state):
        with (
            full(state, leave_bytes=leave_bytes),
            pytest.raises(QuorumError, match=rf"{name}: (site-disk|unanswered).*--resume"),
        ):
            run(scenario, begun, resume=True, **CHANGES)
        _check_goes_on(scenario, begun, undisturbed)


@pytest.mark.parametrize("leave_bytes", [4096, 8192, 12288, 16384, 24576, 32768, 40960])
def test_a_sites_disk_that_fills_up_in_the_middle_of_a_task_damages_nothing(
    leave_bytes: int,
    scenario: Path,
    undisturbed: bytes,
    begun: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There was space when the task came: the ledger, the outbox or the log meets the end of it."""
    name = site_names(scenario)[0]
    state = begun / "simulation" / "sites" / name / "state"
    with small_disk(state):
        with monkeypatch.context() as patch:
            patch.setattr(OneOutput, "_check_space", lambda *args, **kwargs: None)
            with (
                full(state, leave_bytes=leave_bytes),
                pytest.raises(QuorumError, match=rf"{name}: (site-disk|unanswered).*--resume"),
            ):
                run(scenario, begun, resume=True, **CHANGES)
        _check_goes_on(scenario, begun, undisturbed)


def _check_goes_on(scenario: Path, out: Path, undisturbed: bytes) -> None:
    run(scenario, out, resume=True, **CHANGES)

    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == undisturbed
    events = read_events(out / "history.jsonl")
    assert [event["round"] for event in events if event["event"] == "round"] == [1, 2, 3]
    coordinator = out / "simulation" / "coordinator"
    key = SigningKey.load(coordinator / "signing.pem")
    verify_audit_log(coordinator / "audit.jsonl", public_hex=key.public_hex)
    for name in site_names(scenario):
        folder = out / "simulation" / "sites" / name
        site = Site.open(folder)
        verify_audit_log(site.audit.path, public_hex=site.public_key)
        rows = Ledger(folder / "state" / "ledger.sqlite").rows(site.config.data.name)
        released = [(number, "released") for number in (1, 2, 3)]
        assert [(row.server_round, row.state) for row in rows] == released
