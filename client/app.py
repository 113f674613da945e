"""The ClientApp: a relay between Flower and the site, with no data and no keys of its own.

The hospital chooses by node config where the site is; nothing in a run config or a task can:

    agent = "/run/consilium/agent.sock"   its agent, a process of its own (`consilium client agent`)
    site-dir = "/srv/consilium"           the site is opened in this very process (in-process mode)

In Flower's simulation engine, whose node config holds only a partition number, the environment
variable CONSILIUM_SITES names a folder of site folders; node n is the n-th by name, in-process.
"""

from __future__ import annotations

import logging
import os
import uuid
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from common.errors import ConfigError, ConsiliumError
from common.records import Envelope, envelope_of, error_code, to_records

SITES_VARIABLE = "CONSILIUM_SITES"

# Flower's own error codes are small; this one says: the site gave no signed answer.
_UNANSWERED = 1000

logger = logging.getLogger(__name__)
app = ClientApp()


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Relay a `describe` task."""
    return _relay(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Relay a `train` task."""
    return _relay(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Relay an `evaluate` task."""
    return _relay(message, context)


def _relay(message: Message, context: Context) -> Message:
    try:
        reply = _ask(context, envelope_of(message))
    except Exception as error:
        # Nothing vouches for this task, or the site cannot even be opened: no signed answer, and
        # Flower would carry an exception's text to the coordinator word for word.
        correlation_id = uuid.uuid4().hex[:12]
        known = isinstance(error, ConsiliumError)
        logger.error("no answer [%s]: %s", correlation_id, error if known else type(error).__name__)
        refusal = Error(code=_UNANSWERED, reason=f"{error_code(error)} {correlation_id}")
        return Message(refusal, reply_to=message)
    return Message(to_records(reply), reply_to=message)


def _ask(context: Context, envelope: Envelope) -> Envelope:
    # Each only where it is wanted: a relay is a new process for every message, and half of its time is
    # spent on imports.
    agent = context.node_config.get("agent")
    if agent is not None:
        from client.agent_stub import ask_agent

        return ask_agent(Path(str(agent)), envelope)
    folder = site_folder(context)
    from client.in_process import answer_in_process

    return answer_in_process(folder, envelope)


def site_folder(context: Context) -> Path:
    """Return the folder of this node's site. Raises ConfigError when node config names none."""
    node = context.node_config
    if "site-dir" in node:
        return Path(str(node["site-dir"]))
    sites = os.environ.get(SITES_VARIABLE)
    if sites and "partition-id" in node:
        folders = sorted(path for path in Path(sites).iterdir() if path.is_dir())
        return folders[int(node["partition-id"])]
    raise ConfigError(
        "this node's config names neither an agent nor a site; start the SuperNode with "
        "--node-config 'agent=\"...\"'"
    )
