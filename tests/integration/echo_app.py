"""The smallest Flower app that shows what a message carries and where it runs: two rounds of echo.

Written into a folder by `write_echo_app`; the ServerApp leaves out.json with what it saw.
"""

from __future__ import annotations

from pathlib import Path

_PYPROJECT = """
[project]
name = "echo"
version = "1.0.0"
description = "echo"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "consilium"
fab-include = ["echo/*.py"]

[tool.flwr.app.components]
serverapp = "echo.server:app"
clientapp = "echo.client:app"

[tool.flwr.app.config]
out = ""
nodes = 2
fail = false
endless = false

[tool.flwr.app.config.lora]
alpha = 1.5
"""

_SERVER = """
import json
import os
import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    config = dict(context.run_config)
    if config["fail"]:
        raise RuntimeError("asked to fail")
    while len(list(grid.get_node_ids())) < config["nodes"]:
        time.sleep(0.2)
    blob = bytes(range(256)) * 40
    rounds = []
    while len(rounds) < 2 or config["endless"]:
        array = Array("uint8", (len(blob),), "safetensors", blob)
        # A list: the deployment's Grid goes through the messages twice.
        messages = [
            Message(
                RecordDict({"a": ArrayRecord({"x": array})}),
                dst_node_id=node_id,
                message_type="train",
            )
            for node_id in grid.get_node_ids()
        ]
        ids = set(grid.push_messages(messages))
        replies = []
        while ids:
            for reply in grid.pull_messages(ids):
                ids.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
            time.sleep(0.1)
        rounds.append(
            [
                {
                    **reply.content["seen"],
                    "same_bytes": reply.content["a"]["x"].data == blob,
                }
                for reply in replies
            ]
        )
        text = json.dumps({"rounds": rounds, "config": config, "cwd": os.getcwd()})
        Path(config["out"]).write_text(text)
"""

_CLIENT = """
import json
import os

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    seen = {
        "probe": os.environ.get("CONSILIUM_PROBE", ""),
        "node_config": json.dumps(dict(context.node_config)),
        "run_config": json.dumps(dict(context.run_config)),
    }
    records = {"a": message.content["a"], "seen": ConfigRecord(seen)}
    return Message(RecordDict(records), reply_to=message)
"""


def write_echo_app(folder: Path) -> Path:
    """Write the app; return folder."""
    package = folder / "echo"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(_PYPROJECT)
    (package / "__init__.py").touch()
    (package / "server.py").write_text(_SERVER)
    (package / "client.py").write_text(_CLIENT)
    return folder
