"""Every reply is screened before any arithmetic: what does not fit is refused and named.

A refusal costs the site its place in the round and never ends the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Message

from common.adapter import (
    AdapterShape,
    AdapterState,
    FactorSource,
    Float32,
    digest_tensors,
    from_safetensors,
    is_wire_form,
)
from common.errors import ProtocolError, ScreeningError, ShapeError, SignatureError
from common.files import Buffer
from common.records import Envelope, PrivacyRow, Reply, Task, envelope_of, open_reply
from server.roster import Roster
from server.update_norm import displacement, parts_norm, product_norm, update_norm

# A site that says one of these would say it again: it is not asked twice for the same.
FINAL_REFUSALS = frozenset(
    f"site-{code}"
    for code in (
        "policy",
        "budget",
        "config",
        "privacy",
        "model",
        "data",
        "egress",
        "restored",
        "training",
        "overtaken",
    )
) | {"excluded", "revoked"}
# What a site says until its hospital has approved the run: it is asked again later.
AWAITS_APPROVAL = "site-approval"

# What the coordinator can do about a code, where the code alone does not say it.
_MEANINGS = {
    "expired": (
        " (its clock and this machine's differ by more than the time it was given, or it needs longer: "
        "set both clocks, or raise federation.deadline-s)"
    ),
    "overtaken": " (it has begun a later round of this run since)",
    "cancelled": " (the hospital stopped it; ask its people, or exclude the site)",
    "disk": " (its disk is full; it goes on when it is asked after space was made)",
}

# So many times the product may the factors' parts be, before what they leave of it is float32's rounding.
_MAX_CANCELLATION = 1e4
# Far above any factor that was trained, far enough below float32's 3e38 that products and sums stay finite.
_MAX_FACTOR_NORM = 1e15


@dataclass(frozen=True, slots=True)
class AcceptedUpdate:
    """A reply that passed: who sent it, its adapter, its numbers and what it says of its privacy.

    norm: the Frobenius norm of the update, all modules together; see `server.update_norm`.
    """

    site: str
    adapter: FactorSource
    numbers: Mapping[str, float]
    privacy: PrivacyRow
    norm: float


def answer_in(message: Message, *, who: str) -> Envelope:
    """Return the envelope that a node answered with.

    who: for words. Raises ScreeningError with reason "unanswered" when there is none.
    """
    try:
        return envelope_of(message)
    except ProtocolError as error:
        raise ScreeningError("unanswered", f"{who}: {error}") from None


def verified_reply(envelope: Envelope, *, task: Task, site: str, roster: Roster) -> Reply:
    """Return a reply that is truly `site`'s answer to `task`, whatever it says.

    Raises ScreeningError with reason "unknown-site", "signature" or "protocol".
    """
    entry = roster.get(site)
    if entry is None:
        raise ScreeningError("unknown-site", f"site {site!r} is not on the roster; enrol it first")
    try:
        return open_reply(envelope, task=task, site=site, public_hex=entry.public_key)
    except SignatureError as error:
        raise ScreeningError("signature", str(error)) from None
    except ProtocolError as error:
        raise ScreeningError("protocol", str(error)) from None


def screen_reply(reply: Reply) -> None:
    """Refuse a verified reply that says the task was not done.

    Raises ScreeningError with the site's own error code as reason "site-<code>", or "heads" when the site
    does not say where its ledger and audit log stand: a restore from backup would go unseen.
    """
    if reply.error_code:
        meaning = _MEANINGS.get(reply.error_code, "")
        raise ScreeningError(
            f"site-{reply.error_code}",
            f"{reply.site} answered with error code {reply.error_code!r}{meaning}; ask the site for log "
            f"entry {reply.correlation_id}",
        )
    if reply.heads is None:
        raise ScreeningError(
            "heads", f"{reply.site} does not say where its ledger and its audit log stand"
        )


def screen_update(
    reply: Reply,
    adapter: Buffer,
    *,
    task: Task,
    shape: AdapterShape,
    sent: FactorSource,
    max_norm: float,
    by_factors: bool = False,
) -> AcceptedUpdate:
    """Return the update in a verified reply to a train task, and the adapter that came beside it.

    shape: what the site was asked to train. sent: what it was sent to train it from. max_norm:
    aggregation.max-update-norm, 0 for none. by_factors: whether factors are averaged, and how far they moved
    counts too. Raises ScreeningError as `screen_reply` does, and with
    reason "adapter" (not safetensors, wrong tensors, shape or dtype, or anything beside them), "digest",
    "not-finite", "too-large" (finite, but a merge of it might not be), "privacy" (not the protection that was
    asked for), "frozen" (a factor changed that was not to be trained), "update-norm" (above `max_norm`) or
    "cancels" (huge factors of a small product).
    """
    screen_reply(reply)
    site = reply.site
    try:
        state = from_safetensors(adapter, shape=shape)
    except (ProtocolError, ShapeError) as error:
        raise ScreeningError("adapter", f"{site}: {error}") from None
    if not is_wire_form(adapter, shape=shape):
        raise ScreeningError("adapter", f"{site}: the file holds more than its tensors")
    if digest_tensors(state.tensors()) != reply.adapter_digest:
        raise ScreeningError("digest", f"{site}: the adapter is not the one that was signed")
    if not state.is_finite():
        raise ScreeningError("not-finite", f"{site}: the adapter holds NaN or infinity")
    if not state.factor_norm() < _MAX_FACTOR_NORM:
        raise ScreeningError(
            "too-large", f"{site}: a factor of norm {state.factor_norm():.3g} is no trained one"
        )
    privacy = _screen_privacy(reply, task=task)
    _screen_frozen(state, site=site, task=task, sent=sent)
    norm = update_norm(state, sent=sent)
    moved = displacement(state, sent=sent) if by_factors else norm
    if max_norm and not max(norm, moved) <= max_norm:
        raise ScreeningError(
            "update-norm",
            f"{site}: the update has norm {norm:.6g}"
            + (f" and moves the factors by {moved:.6g}" if by_factors else "")
            + f", and aggregation.max-update-norm is {max_norm:g}; ask the site what it trained on, or raise "
            "the limit",
        )
    product = max(product_norm(state), product_norm(sent))
    parts = max(parts_norm(state), moved if by_factors else 0.0)
    if parts > _MAX_CANCELLATION * product:
        raise ScreeningError(
            "cancels",
            f"{site}: factors of norm {parts:.3g} make a product of {product:.3g}; they cancel but for "
            "rounding, and beside others they would drown them",
        )
    return AcceptedUpdate(site, state, reply.numbers, privacy, norm)


def _screen_frozen(state: AdapterState, *, site: str, task: Task, sent: FactorSource) -> None:
    """The factor that was not to be trained must come back as it was sent, to the bit."""
    trained = task.config["round.trained-factors"]
    if trained == "both":
        return
    for module, pair in state.pairs.items():
        before = sent.pair(module)
        if trained == "b":
            same = _same_bits(pair.A, before.A[: state.rank])
        else:
            same = _same_bits(pair.B, before.B[:, : state.rank])
        if not same:
            raise ScreeningError(
                "frozen",
                f"{site}: factor {'A' if trained == 'b' else 'B'} of {module} changed, and this round trains "
                f"{str(trained).upper()} only",
            )


def _same_bits(one: Float32, other: Float32) -> bool:
    """Equal as bytes: 0.0 and -0.0 are equal as numbers and have two digests."""
    return one.tobytes() == other.tobytes()


def _screen_privacy(reply: Reply, *, task: Task) -> PrivacyRow:
    """The protection that was asked for must be the one that the site says it gave."""
    row, asked, site = reply.privacy, task.config, reply.site
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
