"""Every reply is screened before any arithmetic: what does not fit is refused and named.

A refusal costs the site its place in the round and never ends the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from common.adapter import AdapterShape, AdapterState, digest_tensors, from_safetensors
from common.errors import ProtocolError, ScreeningError, ShapeError, SignatureError
from common.records import Envelope, PrivacyRow, Reply, Task, open_reply
from server.roster import Roster

# Far above any adapter that was trained, far enough below float32's 3e38 that sums stay finite.
_MAX_PRODUCT_NORM = 1e30


@dataclass(frozen=True, slots=True)
class AcceptedUpdate:
    """A reply that passed: who sent it, its adapter, its numbers and what it says of its privacy."""

    site: str
    state: AdapterState
    numbers: Mapping[str, float]
    privacy: PrivacyRow


def screen_reply(envelope: Envelope, *, task: Task, site: str, roster: Roster) -> Reply:
    """Return a reply that is truly `site`'s answer to `task`.

    Raises ScreeningError with reason "unknown-site", "signature", "protocol", or the site's own error
    code as "site-<code>" when it answers that it could not do the task.
    """
    entry = roster.get(site)
    if entry is None:
        raise ScreeningError("unknown-site", f"site {site!r} is not on the roster; enrol it first")
    try:
        reply = open_reply(envelope, task=task, site=site, public_hex=entry.public_key)
    except SignatureError as error:
        raise ScreeningError("signature", str(error)) from None
    except ProtocolError as error:
        raise ScreeningError("protocol", str(error)) from None
    if reply.error_code:
        raise ScreeningError(
            f"site-{reply.error_code}",
            f"{site} answered with error code {reply.error_code!r}; ask the site for log entry "
            f"{reply.correlation_id}",
        )
    return reply


def screen_update(
    envelope: Envelope, *, task: Task, site: str, roster: Roster, shape: AdapterShape
) -> AcceptedUpdate:
    """Return the update in a reply to a train task.

    shape: what the site was asked to train. Raises ScreeningError as `screen_reply` does, and with
    reason "adapter" (not safetensors, wrong tensors, shape or dtype), "digest", "not-finite",
    "privacy" (not the protection that was asked for) or "too-large" (finite, but a merge of it might not be).
    """
    reply = screen_reply(envelope, task=task, site=site, roster=roster)
    try:
        state = from_safetensors(envelope.adapter, shape=shape)
    except (ProtocolError, ShapeError) as error:
        raise ScreeningError("adapter", f"{site}: {error}") from None
    if digest_tensors(state.tensors()) != reply.adapter_digest:
        raise ScreeningError("digest", f"{site}: the adapter is not the one that was signed")
    if not state.is_finite():
        raise ScreeningError("not-finite", f"{site}: the adapter holds NaN or infinity")
    if not state.product_norm_bound() < _MAX_PRODUCT_NORM:
        raise ScreeningError("too-large", f"{site}: the adapter's product overflows float32")
    return AcceptedUpdate(site, state, reply.numbers, _screen_privacy(reply, task=task, site=site))


def _screen_privacy(reply: Reply, *, task: Task, site: str) -> PrivacyRow:
    """The protection that was asked for must be the one that the site says it gave."""
    row, asked = reply.privacy, task.config
    if row is None:
        raise ScreeningError("privacy", f"{site} does not say what privacy its update has")
    wanted = (asked["privacy.unit"], asked["privacy.target-delta"])
    given = (row.unit, row.delta)
    if given != wanted or (row.unit != "none" and math.isinf(row.epsilon)):
        raise ScreeningError(
            "privacy",
            f"{site} trained with unit and delta {given} at epsilon {row.epsilon}, asked {wanted}",
        )
    return row
