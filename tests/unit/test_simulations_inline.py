"""The inline engine: Flower's Grid over ClientApps in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.supercore.run import Run

from client.app import app as relay
from common.records import Envelope, from_records, to_records
from simulations.inline import InlineGrid


def _echo_app(seen: list[str]) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen.append(str(context.node_config["site-dir"]))
        config = message.content["words"]
        assert isinstance(config, ConfigRecord)
        config["said"] = "overwritten"
        reply = RecordDict({"answer": ConfigRecord({"site": context.node_config["site-dir"]})})
        return Message(reply, reply_to=message)

    return app


def _message(node: int, words: ConfigRecord | None = None) -> Message:
    content = RecordDict({"words": words or ConfigRecord({"said": "hello"})})
    return Message(content, node, MessageType.TRAIN, group_id="1")


def _grid(seen: list[str], sites: int = 2) -> InlineGrid:
    return InlineGrid(_echo_app(seen), [Path(f"/sites/{n}") for n in range(sites)])


def test_every_site_folder_is_one_node_from_two_up() -> None:
    assert _grid([], sites=3).get_node_ids() == [2, 3, 4]


def test_site_runs_when_its_reply_is_asked_for_and_only_once() -> None:
    seen: list[str] = []
    grid = _grid(seen)
    first, second = grid.push_messages([_message(2), _message(3)])
    assert seen == []
    replies = grid.pull_messages([second])
    assert seen == ["/sites/1"]
    assert [reply.metadata.reply_to_message_id for reply in replies] == [second]
    assert grid.pull_messages([second]) == []
    assert len(grid.pull_messages([first, second])) == 1
    assert seen == ["/sites/1", "/sites/0"]


def test_send_and_receive_returns_one_reply_for_each_message() -> None:
    grid = _grid([])
    replies = list(grid.send_and_receive([_message(3), _message(2)]))
    answers = [reply.content["answer"] for reply in replies]
    assert [dict(answer) for answer in answers] == [{"site": "/sites/1"}, {"site": "/sites/0"}]
    assert [reply.metadata.src_node_id for reply in replies] == [3, 2]


def test_what_a_site_does_to_its_message_reaches_no_other_site() -> None:
    grid = _grid([])
    shared = ConfigRecord({"said": "hello"})
    list(grid.send_and_receive([_message(2, shared), _message(3, shared)]))
    assert shared["said"] == "hello"


def test_an_error_crosses_as_an_error_without_content() -> None:
    grid = InlineGrid(relay, [Path("/no/such/site")])
    content = to_records(Envelope(b"{}", b"no signature"))
    (reply,) = grid.send_and_receive([Message(content, 2, MessageType.TRAIN, group_id="1")])
    assert reply.has_error()
    assert "/no/such/site" not in str(reply.error.reason)


def test_grid_holds_the_run_it_is_given() -> None:
    grid = _grid([])
    run = Run.create_empty(7)
    grid.set_run(run)
    assert grid.run is run


def test_envelope_survives_flowers_own_serialisation() -> None:
    """The inline engine passes objects by; this is what the wire makes of them."""
    adapter = np.arange(600, dtype=np.uint8).tobytes()
    sent = Envelope(b'{"kind":"train"}', b"s" * 64, adapter)
    proto = recorddict_to_proto(to_records(sent))
    assert from_records(recorddict_from_proto(proto)) == sent


def test_arrays_cross_with_their_bytes_untouched() -> None:
    array = Array("uint8", (3,), "safetensors", b"abc")
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    content = RecordDict({"adapter": ArrayRecord({"adapter": array})})
    grid = InlineGrid(app, [Path("/sites/0")])
    (reply,) = grid.send_and_receive([Message(content, 2, MessageType.TRAIN, group_id="1")])
    record = reply.content["adapter"]
    assert isinstance(record, ArrayRecord)
    assert record is not content["adapter"]
    assert record["adapter"].data == b"abc"
