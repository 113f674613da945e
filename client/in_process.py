"""A site opened in the ClientApp's own process: for simulations, and where node config asks for it.

No run config and no task leads here: a coordinator cannot turn a hospital's agent off.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from client.site import Site
from common.records import Envelope


def answer_in_process(folder: Path, envelope: Envelope) -> Envelope:
    """Return the signed reply of the site in a folder. Raises as `Site.open` and `Site.answer` do."""
    return open_site(folder).answer(envelope)


@lru_cache(maxsize=128)
def open_site(folder: Path) -> Site:
    """Return the site of a folder, opened once per process."""
    return Site.open(folder)
