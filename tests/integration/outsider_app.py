"""An outsider's own bundle: its ServerApp sends what he has to every node, whose ClientApp tries it all.

Written into a folder by `write_outsider_app`. The ServerApp reads attack.json, {name: envelope} with each of
the envelope's parts in hexadecimal, and leaves found.json: {the agent's socket: {name: what came of it}}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from common.records import Envelope

_PYPROJECT = """
[project]
name = "outsider"
version = "1.0.0"
description = "outsider"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "outsider"
fab-include = ["outsider/*.py"]

[tool.flwr.app.components]
serverapp = "outsider.server:app"
clientapp = "outsider.client:app"

[tool.flwr.app.config]
folder = ""
nodes = 2
"""

_SERVER = """
import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    folder = Path(context.run_config["folder"])
    while len(list(grid.get_node_ids())) < context.run_config["nodes"]:
        time.sleep(0.2)
    attack = ConfigRecord({"attack": (folder / "attack.json").read_text()})
    messages = [
        Message(RecordDict({"attack": attack}), dst_node_id=node, message_type="train")
        for node in grid.get_node_ids()
    ]
    ids, found = set(grid.push_messages(messages)), {}
    while ids:
        for reply in grid.pull_messages(ids):
            ids.discard(reply.metadata.reply_to_message_id)
            record = dict(reply.content["found"])
            found[record.pop("socket")] = record
        time.sleep(0.2)
    (folder / "whole.json").write_text(json.dumps(found))
    (folder / "whole.json").rename(folder / "found.json")
"""

# What a hospital has installed serves him as well as it serves the relay.
_CLIENT = """
import hashlib
import json

import grpc
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from client.agent_pb2 import AgentStatus, CancelReply, CancelRequest, Piece, StatusRequest
from client.agent_wire import AGENT_SERVICE, CONTROL_SERVICE, in_pieces
from common.records import Envelope

app = ClientApp()


@app.train()
def train(message, context):
    socket = context.node_config["agent"]
    found = {"socket": socket}
    attack = json.loads(message.content["attack"]["attack"])
    with grpc.insecure_channel("unix:" + socket) as channel:
        for name, request, reply in (
            ("Status", StatusRequest, AgentStatus), ("Cancel", CancelRequest, CancelReply)
        ):
            ask = channel.unary_unary(
                f"/{CONTROL_SERVICE}/{name}",
                request_serializer=request.SerializeToString,
                response_deserializer=reply.FromString,
            )
            found[name] = outcome(lambda: str(ask(request(), timeout=30)))
        answer = channel.stream_stream(
            f"/{AGENT_SERVICE}/Answer",
            request_serializer=Piece.SerializeToString,
            response_deserializer=Piece.FromString,
        )
        for name, parts in attack.items():
            envelope = Envelope(**{part: bytes.fromhex(text) for part, text in parts.items()})
            found[name] = outcome(lambda: told(list(answer(in_pieces(envelope), timeout=60))))
    return Message(RecordDict({"found": ConfigRecord(found)}), reply_to=message)


def outcome(attempt):
    try:
        return attempt()
    except grpc.RpcError as error:
        return f"{error.code().name}, {error.details()}"


def told(pieces):
    code = json.loads(pieces[0].opening.payload)["error_code"]
    adapter = b"".join(piece.adapter for piece in pieces)
    return f"replied {code or hashlib.sha256(adapter).hexdigest()}, {len(adapter)} adapter bytes"
"""


def write_outsider_app(folder: Path, attack: Mapping[str, Envelope]) -> Path:
    """Write the app and attack.json; return folder."""
    package = folder / "outsider"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(_PYPROJECT)
    (package / "__init__.py").touch()
    (package / "server.py").write_text(_SERVER)
    (package / "client.py").write_text(_CLIENT)
    content = {
        name: {part: bytes(data).hex() for part, data in asdict(envelope).items()}
        for name, envelope in attack.items()
    }
    (folder / "attack.json").write_text(json.dumps(content))
    return folder
