"""The site agent over its socket: a real process, a real model, real signatures."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import tomlkit

from client import agent_stub, agent_wire
from client.agent_control import cancel_task
from client.agent_pb2 import AgentStatus, StatusRequest
from client.agent_stub import ask_agent
from client.ledger import Ledger
from common.audit_log import read_audit_log
from common.errors import BusyError, DiskError, EngineError, ProtocolError
from common.records import Envelope, Reply, Task, open_reply
from common.signing import SigningKey
from tests.bench.agent_memory import measure
from tests.chaos.disks import full, small_disk
from tests.integration.agents import PROJECT, AgentProcess, running_agent, wait_until
from tests.unit.hospital import Hospital, make_hospital

pytestmark = pytest.mark.integration

# Of a task that is in nobody's interest to wait for.
LONG = {"train.local-steps": 5000}


def _hospital(folder: Path, model: Path) -> Hospital:
    return make_hospital(
        folder / "north",
        model,
        policy={"max-epsilon": float("inf"), "max-tokens": 10**10},
        settings={"privacy.noise-multiplier": 2.0},
    )


@pytest.fixture
def hospital(tmp_path: Path, tiny_model_dir: Path) -> Hospital:
    return _hospital(tmp_path, tiny_model_dir)


@pytest.fixture(scope="module")
def idle_hospital(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Hospital:
    """The hospital of `idle`, for what never gets as far as training."""
    return _hospital(tmp_path_factory.mktemp("idle"), tiny_model_dir)


@pytest.fixture(scope="module")
def idle(idle_hospital: Hospital) -> Iterator[AgentProcess]:
    with running_agent(idle_hospital.folder) as agent:
        yield agent


@pytest.fixture
def agent(hospital: Hospital) -> Iterator[AgentProcess]:
    with running_agent(hospital.folder) as agent:
        yield agent


@pytest.fixture
def aside() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def _opened(answer: Envelope, task: Task, hospital: Hospital) -> Reply:
    key = SigningKey.load(hospital.folder / "keys" / "signing.pem").public_hex
    return open_reply(answer, task=task, site="north", public_hex=key)


def _states(hospital: Hospital) -> list[str]:
    rows = Ledger(hospital.folder / "state" / "ledger.sqlite").rows("notes")
    return [row.state for row in rows]


def _refusals(hospital: Hospital) -> list[str]:
    path = hospital.folder / "state" / "audit.jsonl"
    return [entry.fields["code"] for entry in read_audit_log(path) if entry.event == "refused"]


def _begin(
    aside: ThreadPoolExecutor, agent: AgentProcess, hospital: Hospital, task: Task
) -> Future[Envelope]:
    answer = aside.submit(ask_agent, agent.config.socket_path, hospital.seal(task))
    wait_until(agent.trains)
    return answer


def test_a_task_goes_in_and_a_signed_reply_with_an_adapter_comes_out(
    agent: AgentProcess, hospital: Hospital
) -> None:
    task = hospital.task()
    answer = ask_agent(agent.config.socket_path, hospital.seal(task))

    reply = _opened(answer, task, hospital)
    assert (reply.error_code, reply.numbers["steps"]) == ("", 2)
    assert len(answer.adapter) == len(hospital.adapter.to_safetensors())
    assert answer.adapter != hospital.adapter.to_safetensors()
    assert _states(hospital) == ["released"]
    # The model stays for the next round, and the same task again brings the same bytes.
    assert agent.status().base_digest == hospital.base_digest
    assert ask_agent(agent.config.socket_path, hospital.seal(task)).adapter == answer.adapter
    assert agent.status().answered == 2


def test_the_sockets_are_for_owner_and_group_and_the_control_for_the_owner(
    idle: AgentProcess,
) -> None:
    relay, control = idle.config.socket_path, idle.config.control_socket_path
    assert stat.S_IMODE(relay.stat().st_mode) == 0o660
    assert stat.S_IMODE(control.stat().st_mode) == 0o600


def test_whoever_may_ask_may_neither_look_nor_cancel(idle: AgentProcess) -> None:
    with (
        agent_wire.socket_address(idle.config.socket_path) as address,
        grpc.insecure_channel(address) as channel,
    ):
        for method in ("Status", "Cancel"):
            call = channel.unary_unary(
                f"/{agent_wire.CONTROL_SERVICE}/{method}",
                request_serializer=StatusRequest.SerializeToString,
                response_deserializer=AgentStatus.FromString,
            )
            with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
                call(StatusRequest(), timeout=60)


def test_a_second_task_is_told_that_the_first_is_trained_and_a_describe_is_answered(
    agent: AgentProcess, hospital: Hospital, aside: ThreadPoolExecutor
) -> None:
    first = _begin(aside, agent, hospital, hospital.task(settings=LONG))
    work = agent.status().work
    assert (work.run, work.server_round, work.steps) == ("run-1", 1, 5000)

    second = hospital.task(run_uid="run-2", expires_at=int(time.time()) + 4)
    with pytest.raises(BusyError, match="was busy until the task expired"):
        ask_agent(agent.config.socket_path, hospital.seal(second))
    describe = hospital.task(0, kind="describe", site="", adapter_digest="")
    answer = ask_agent(agent.config.socket_path, _sealed(describe, hospital))
    assert _opened(answer, describe, hospital).numbers["declared-size"] == 12
    assert not first.done()
    assert len(_states(hospital)) == 1
    cancel_task(agent.config.control_socket_path)


def test_a_later_round_of_the_same_run_is_not_turned_away(
    agent: AgentProcess, hospital: Hospital, aside: ThreadPoolExecutor
) -> None:
    first_task, later = hospital.task(settings=LONG), hospital.task(2)
    first = _begin(aside, agent, hospital, first_task)
    answer = ask_agent(agent.config.socket_path, hospital.seal(later))

    assert _opened(answer, later, hospital).error_code == ""
    assert _opened(first.result(300), first_task, hospital).error_code == "overtaken"
    assert _states(hospital) == ["released", "released"]


def test_a_cancelled_task_stops_and_its_one_charge_covers_the_next_try(
    agent: AgentProcess, hospital: Hospital, aside: ThreadPoolExecutor
) -> None:
    task = hospital.task(settings={"train.local-steps": 400})
    assert not cancel_task(agent.config.control_socket_path)
    answer = _begin(aside, agent, hospital, task)
    assert cancel_task(agent.config.control_socket_path)

    assert _opened(answer.result(300), task, hospital).error_code == "cancelled"
    assert (_states(hospital), _refusals(hospital)) == (["reserved"], ["cancelled"])
    again = ask_agent(agent.config.socket_path, hospital.seal(task))
    assert _opened(again, task, hospital).error_code == ""
    assert _states(hospital) == ["released"]


def test_training_stops_when_who_asked_for_it_dies(agent: AgentProcess, hospital: Hospital) -> None:
    sealed = hospital.seal(hospital.task(settings=LONG))
    relay = subprocess.Popen(
        [sys.executable, "-c", _RELAY, str(agent.config.socket_path)],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
    )
    assert relay.stdin is not None
    relay.stdin.write(
        b"\n".join(part.hex().encode() for part in
                   (sealed.payload, sealed.signature, bytes(sealed.adapter)))
    )  # fmt: skip
    relay.stdin.close()
    wait_until(agent.trains)
    relay.send_signal(signal.SIGKILL)
    relay.wait()

    wait_until(lambda: not agent.status().HasField("work"), timeout_s=120)
    assert (_states(hospital), _refusals(hospital)) == (["reserved"], ["cancelled"])


# What the relay does, and nothing else: it must not need torch.
_RELAY = """
import sys
from pathlib import Path
from client.agent_stub import ask_agent
from common.records import Envelope
assert not {"torch", "transformers", "datasets"} & set(sys.modules)
payload, signature, adapter = (bytes.fromhex(line) for line in sys.stdin.read().split("\\n"))
ask_agent(Path(sys.argv[1]), Envelope(payload, signature, adapter))
"""


def test_who_waits_gets_the_reply_from_the_agent_that_takes_the_dead_ones_place(
    hospital: Hospital, aside: ThreadPoolExecutor
) -> None:
    task = hospital.task(settings={"train.local-steps": 300})
    with running_agent(hospital.folder) as agent:
        answer = _begin(aside, agent, hospital, task)
        agent.stop(signal.SIGKILL)
    with running_agent(hospital.folder):
        reply = _opened(answer.result(300), task, hospital)

    assert reply.error_code == ""
    assert _states(hospital) == ["released"]


def test_an_agent_that_ends_gives_no_half_answer(
    hospital: Hospital, aside: ThreadPoolExecutor
) -> None:
    """Stopped by SIGTERM in the middle: the relay waits for the next one, and no refusal travels."""
    task = hospital.task(settings={"train.local-steps": 300})
    with running_agent(hospital.folder) as agent:
        answer = _begin(aside, agent, hospital, task)
        assert agent.stop() == 0
        assert not answer.done()
    with running_agent(hospital.folder):
        assert _opened(answer.result(300), task, hospital).error_code == ""


def test_nobody_there_is_said_after_a_time(hospital: Hospital) -> None:
    socket = hospital.folder / "state" / "agent.sock"
    with pytest.raises(EngineError, match=r"no agent answers at .*consilium client up"):
        ask_agent(socket, hospital.seal(hospital.task()), away_s=0.2)


def test_a_task_that_no_believed_coordinator_signed_is_answered_by_nothing(
    idle: AgentProcess, idle_hospital: Hospital
) -> None:
    sealed = idle_hospital.seal(idle_hospital.task(), SigningKey.generate())
    with pytest.raises(ProtocolError, match="INVALID_ARGUMENT, signature"):
        ask_agent(idle.config.socket_path, sealed)
    assert (_states(idle_hospital), _refusals(idle_hospital)[-1]) == ([], "signature")


def test_another_version_of_the_socket_is_said_in_words(
    idle: AgentProcess, idle_hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_wire, "AGENT_PROTOCOL", 2)
    with pytest.raises(ProtocolError, match=r"speaks version 2, this one 1; upgrade the older"):
        ask_agent(idle.config.socket_path, idle_hospital.seal(idle_hospital.task()))


def test_more_than_was_announced_is_refused(
    idle: AgentProcess, idle_hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = agent_wire.in_pieces

    def longer(envelope: Envelope) -> Iterator[object]:
        yield from whole(envelope)
        yield from list(whole(envelope))[1:]

    monkeypatch.setattr(agent_stub, "in_pieces", longer)
    with pytest.raises(ProtocolError, match="INVALID_ARGUMENT, protocol"):
        ask_agent(idle.config.socket_path, idle_hospital.seal(idle_hospital.task()))
    assert _states(idle_hospital) == []


def test_adapters_take_no_memory_on_their_way(tmp_path: Path) -> None:
    """As `python -m tests.bench.agent_memory` measures at 200 MB, at 59 MB."""
    size, found = measure(tmp_path, hidden_size=1024, intermediate_size=2752, rank=400)
    assert size > 50e6
    assert found["transport alone"].both < 1.5
    assert found["transport alone"].anonymous < 0.5
    # Weights, gradients, what they were before: the training itself.
    assert found["with training"].anonymous < 4.0


def test_the_model_leaves_the_memory_when_nobody_asks(hospital: Hospital) -> None:
    path = hospital.folder / "site.toml"
    document = tomlkit.parse(path.read_text())
    document["agent"] = {"idle-unload-s": 1.0}
    path.write_text(tomlkit.dumps(document))
    with running_agent(hospital.folder) as agent:
        task = hospital.task()
        ask_agent(agent.config.socket_path, hospital.seal(task))
        assert agent.status().base_digest == hospital.base_digest
        wait_until(lambda: not agent.status().base_digest, timeout_s=120)
        # And comes back.
        second = hospital.task(2)
        answer = ask_agent(agent.config.socket_path, hospital.seal(second))
        assert _opened(answer, second, hospital).error_code == ""


def test_a_second_agent_of_a_folder_is_refused(idle: AgentProcess, idle_hospital: Hospital) -> None:
    second = subprocess.run(
        [
            sys.executable,
            "-m",
            "common.cli",
            "client",
            "agent",
            "--site",
            str(idle_hospital.folder),
        ],
        cwd=PROJECT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert second.returncode == EngineError.exit_code
    assert f"process {idle.process.pid} is the agent of" in second.stderr


def test_a_full_disk_is_said_and_the_task_goes_on_once_there_is_space(hospital: Hospital) -> None:
    task, state = hospital.task(), hospital.folder / "state"
    hospital.open()
    with small_disk(state), running_agent(hospital.folder) as agent:
        with full(state, leave_bytes=0), pytest.raises(DiskError, match="disk of the agent"):
            ask_agent(agent.config.socket_path, hospital.seal(task))
        assert _states(hospital) == []
        answer = ask_agent(agent.config.socket_path, hospital.seal(task))
        assert _opened(answer, task, hospital).error_code == ""


def test_a_folder_deeper_than_a_sockets_path_may_be_is_no_trouble(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    deep = tmp_path / ("x" * 120) / "north"
    deep.parent.mkdir()
    hospital = make_hospital(deep, tiny_model_dir, settings={"privacy.noise-multiplier": 2.0})
    task = hospital.task()
    with running_agent(deep) as agent:
        answer = ask_agent(agent.config.socket_path, hospital.seal(task))
    assert _opened(answer, task, hospital).error_code == ""


def _sealed(task: Task, hospital: Hospital) -> Envelope:
    payload = hospital.seal(task)
    return Envelope(payload.payload, payload.signature)
