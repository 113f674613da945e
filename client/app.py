"""The ClientApp: a relay between Flower and the site, with no data and no keys of its own.

The hospital chooses by node config where the site is; nothing in a run config or a task can:

    site-dir = "/srv/consilium"   the site is opened in this very process (in-process mode)

In Flower's simulation engine, whose node config holds only a partition number, the environment
variable CONSILIUM_SITES names a folder of site folders; node n is the n-th by name.
"""

from __future__ import annotations

import logging
import os
import uuid
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from common.errors import ConfigError, ConsiliumError
from common.records import envelope_of, error_code, to_records

if TYPE_CHECKING:
    from client.site import Site

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


def _relay(message: Message, context: Context) -> Message:
    try:
        site = open_site(site_folder(context))
        reply = site.answer(envelope_of(message))
    except Exception as error:
        # Nothing vouches for this task, or the site cannot even be opened: no signed answer, and
        # Flower would carry an exception's text to the coordinator word for word.
        correlation_id = uuid.uuid4().hex[:12]
        known = isinstance(error, ConsiliumError)
        logger.error("no answer [%s]: %s", correlation_id, error if known else type(error).__name__)
        refusal = Error(code=_UNANSWERED, reason=f"{error_code(error)} {correlation_id}")
        return Message(refusal, reply_to=message)
    return Message(to_records(reply), reply_to=message)


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
        "this node's config names no site; start the SuperNode with --node-config 'site-dir=\"...\"'"
    )


@lru_cache(maxsize=128)
def open_site(folder: Path) -> Site:
    """Return the site of a folder, opened once per process."""
    from client.site import Site

    return Site.open(folder)
