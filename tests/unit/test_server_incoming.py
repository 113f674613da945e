"""Accepted updates between their screening and their merge: on disk, one file each, and gone afterwards."""

from __future__ import annotations

import errno
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common.adapter_file import AdapterFile
from common.errors import DiskError
from common.records import Envelope, Task
from common.signing import SigningKey
from server.history import Event, read_events
from server.incoming import incoming_folder
from server.roster import Roster
from simulations.run import run_simulation
from tests.unit.fake_federation import Answer, FakeClock, FakeSite, honest, sends_nan, silent
from tests.unit.room import CURRENT, Room
from tests.unit.scenarios import run, simulation, site_names


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock().install(monkeypatch)


def test_what_is_accepted_lies_in_a_file_of_its_own_that_nobody_else_reads(
    clock: FakeClock, tmp_path: Path
) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "evil": [sends_nan]})
    replies = room.federation.run_round(CURRENT, server_round=1)
    paths = []
    for update in replies.updates:
        assert isinstance(update.adapter, AdapterFile)
        (sealed,) = room.sites[update.site].sealed
        assert update.adapter.path.read_bytes() == sealed.adapter
        assert stat.S_IMODE(update.adapter.path.stat().st_mode) == 0o600
        paths.append(update.adapter.path)
    assert sorted(room.incoming.iterdir()) == sorted(paths)
    assert len(paths) == 2


def test_nothing_of_a_message_is_held_once_its_update_lies_on_disk(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten sites' adapters of 160 MB would else be in memory until the slowest has answered."""
    sent: dict[str, bytes] = {}

    def remembered(site: FakeSite, task: Task, envelope: Envelope) -> Answer:
        answer = honest(site, task, envelope)
        assert isinstance(answer, Envelope)
        site.sealed.clear()
        sent[site.name] = bytes(answer.adapter)
        return answer

    room = Room(clock, tmp_path, {"oslo": [remembered], "bern": [remembered], "kiel": [silent]})
    room.federation.gather()
    held: list[dict[str, int]] = []
    sleep = clock.sleep

    def look(seconds: float) -> None:
        sleep(seconds)
        held.append({name: sys.getrefcount(sent[name]) for name in sorted(sent)})

    monkeypatch.setattr(clock, "sleep", look)
    room.federation.run_round(CURRENT, server_round=1)
    # While kiel is waited for: this test's dictionary and the call's own argument.
    mine = {"bern": b"".join([b"of", b"mine"])}
    alone = sys.getrefcount(mine["bern"])
    assert held[0] == {"bern": alone, "oslo": alone}


def test_what_will_not_be_merged_is_removed_at_once(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "kiel": [silent]})
    room.federation.gather()
    sleep = clock.sleep

    def then_exclude(seconds: float) -> None:
        sleep(seconds)
        room.exclusions.add("bern", why="withdrawn")

    monkeypatch.setattr(clock, "sleep", then_exclude)
    with pytest.raises(Exception, match="bern: excluded"):
        room.federation.run_round(CURRENT, server_round=1)
    (left,) = room.incoming.iterdir()
    assert left.read_bytes() == room.sites["oslo"].sealed[0].adapter


def test_a_site_that_is_asked_again_with_new_keys_has_its_new_update_merged(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(
        clock,
        tmp_path,
        {"oslo": [honest], "bern": [silent, honest], "kiel": [honest]},
        **{"federation__min-sites": 3},
    )
    room.federation.gather()
    kiel, sleep, old_key = room.sites["kiel"], clock.sleep, room.sites["kiel"].key

    def then_rotate(seconds: float) -> None:
        sleep(seconds)
        if kiel.key is old_key:
            kiel.key = SigningKey.generate()
            new = replace(kiel.entry, public_key=kiel.key.public_hex)
            others = [site.entry for site in room.sites.values() if site is not kiel]
            Roster([*others, new]).save(room.roster_file)

    monkeypatch.setattr(clock, "sleep", then_rotate)
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert [event["site"] for event in room.events("reply")].count("kiel") == 2
    assert [event["reason"] for event in room.events("refused") if event["site"] == "kiel"] == [
        "rotated"
    ]
    files = {update.site: update.adapter for update in replies.updates}
    assert set(files) == {"oslo", "bern", "kiel"}
    assert isinstance(files["kiel"], AdapterFile)
    assert files["kiel"].path.read_bytes() == kiel.sealed[1].adapter
    assert len(list(room.incoming.iterdir())) == 3


def test_the_folder_is_empty_at_first_and_gone_at_last(tmp_path: Path) -> None:
    path = tmp_path / "incoming"
    path.mkdir()
    (path / "left by a killed process").write_bytes(b"x")
    with incoming_folder(path):
        assert list(path.iterdir()) == []
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        (path / "one").write_bytes(b"x")
    assert not path.exists()


# A whole run


def test_each_merge_empties_the_folder_and_a_finished_run_has_none(
    scenario: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    counts: list[tuple[str, int]] = []

    def listen(event: Event) -> None:
        if event["event"] in ("reply", "round"):
            counts.append((event["event"], len(list((out / "incoming").iterdir()))))

    run_simulation(simulation(scenario, out), listener=listen)
    assert counts == [("reply", 1), ("reply", 2), ("round", 0)] * 2
    assert not (out / "incoming").exists()
    norms = [e["update_norm"] for e in read_events(out / "history.jsonl") if e["event"] == "reply"]
    assert len(norms) == 4
    assert all(norm > 0 and norm == float(f"{norm:.6g}") for norm in norms)


def test_a_resumed_run_does_not_keep_what_a_killed_one_left(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def interrupt(event: Event) -> None:
        if event["event"] == "reply":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_simulation(simulation(scenario, out), listener=interrupt)
    assert not (out / "incoming").exists()
    # As kill -9 leaves it.
    (out / "incoming").mkdir()
    (out / "incoming" / "of the killed one").write_bytes(b"x")
    run(scenario, out, resume=True)
    run(scenario, tmp_path / "undisturbed")
    name = Path("adapter", "adapter_model.safetensors")
    assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert not (out / "incoming").exists()


def test_a_disk_that_fills_up_with_updates_ends_the_run_as_other_full_disks_do(
    scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def full(descriptor: int, content: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DiskError, match=r"the disk of .* is full .*continue with --resume"):
            run(scenario, out)
    assert not (out / "incoming").exists()
    (stopped,) = [e for e in read_events(out / "history.jsonl") if e["event"] == "stopped"]
    assert stopped["code"] == "disk"
    run(scenario, out, resume=True)
    # No site was refused for the coordinator's disk.
    assert [e for e in read_events(out / "history.jsonl") if e["event"] == "refused"] == []
    assert len(site_names(scenario)) == 2
