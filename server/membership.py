"""Who takes part: enrolling a hospital, taking its new keys, revoking it.

Whatever takes something away does the part that protects first: keys are listed as revoked before the roster
changes, and the roster before Flower is told. Every one of them may be given again when it was cut off.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.common.constant import PUBLIC_KEY_ALREADY_IN_USE_MESSAGE

from common.audit_log import read_audit_log
from common.enrolment import Bundle, Enrolment, seal_bundle
from common.errors import CheckpointError, ConfigError, EngineError, SignatureError
from common.locks import LockHeldError, hold_lock
from common.membership import Rotation, Withdrawal
from common.signing import SigningKey
from server.audit import CoordinatorAudit
from server.coordinator import Coordinator
from server.flower_control import ControlError
from server.revocations import Revocations
from server.roster import Roster, RosterEntry
from server.superlink_state import registered_nodes, strike_nodes

logger = logging.getLogger(__name__)

# So long another command of these may take.
_OTHERS_S = 60.0
WITHDRAWN = "withdrawn"
_ROTATED = "rotated"


@dataclass(frozen=True, slots=True)
class Revoked:
    """A site that is off the roster. again: it was already. node_known: whether its node could be named."""

    site: str
    again: bool
    node_known: bool


def enrol(coordinator: Coordinator, enrolment: Enrolment) -> bytes:
    """Take a hospital in: register its SuperNode, pin its key; return the bundle that it is sent.

    The same enrolment again gives the same bundle; with another node key, the former node is unregistered.
    Raises ConfigError when a site of that name has another signing key, when a key was revoked, or when
    `consilium server up` does not run, which its SuperNode must be registered with.
    """
    with _alone(coordinator):
        known = coordinator.roster().get(enrolment.site)
        if known is not None and known.public_key != enrolment.signing_key:
            raise ConfigError(
                f"a site {enrolment.site!r} is enrolled with another key; if the hospital made new keys, let "
                "it send what `consilium client rotate` makes; if it lost the old ones, revoke it first: "
                f"consilium server revoke {enrolment.site} {coordinator.folder}"
            )
        return _take(coordinator, enrolment, known)


def rotate(coordinator: Coordinator, rotation: Rotation) -> bytes:
    """Take a hospital's new keys in the place of the old ones, which hold no more; return its bundle.

    The same rotation again gives the same bundle. Raises SignatureError when the key that signed it is not
    the pinned one, ConfigError as `enrol`.
    """
    with _alone(coordinator):
        known = coordinator.roster().get(rotation.site)
        enrolment = rotation.opened()
        if known is None:
            raise ConfigError(
                f"no site {rotation.site!r} is on the roster, so it has no keys to change; to take part it "
                "sends an enrolment"
            )
        if known.public_key not in (rotation.former_key, enrolment.signing_key):
            raise SignatureError(
                f"this rotation is signed by a key that is not the pinned one of {rotation.site}; do not "
                "take it, and call the hospital"
            )
        return _take(coordinator, enrolment, known)


def revoke(
    coordinator: Coordinator, site: str, *, why: str = "", withdrawal: Withdrawal | None = None
) -> Revoked:
    """Shut a site out for good, at once, also of a run that goes; its keys cannot be enrolled again.

    withdrawal: the hospital's own word. Raises ConfigError for a site that nobody knows, SignatureError when
    the withdrawal is not the site's own, EngineError when Flower could not be told: then the site is off the
    roster, and the same command again tells Flower.
    """
    with _alone(coordinator):
        roster, revocations = coordinator.roster(), Revocations(coordinator.revocations_file)
        entry = roster.get(site)
        if entry is not None:
            if withdrawal is not None:
                _check_withdrawal(coordinator, entry, withdrawal)
                why = WITHDRAWN
            revocations.add(entry, why=why)
            Roster(one for one in roster.values() if one.site != site).save(coordinator.roster_file)
        last = revocations.of_site(site)
        if last is None:
            named = f"enrolled are {', '.join(roster)}" if roster else "there is none yet"
            raise ConfigError(f"no site {site!r} is enrolled; {named}")
        _note_once(coordinator, "revoked", site, key=last.public_key, why=last.why)
        _unregister_revoked(coordinator)
    return Revoked(site, again=entry is None, node_known=bool(last.node_key))


def strike_revoked(coordinator: Coordinator) -> None:
    """Unregister every node whose key was revoked, while no SuperLink runs."""
    keys = [one.node_key for one in Revocations(coordinator.revocations_file).all()]
    struck = strike_nodes(coordinator.superlink_database, keys)
    if struck:
        logger.info("unregistered %d nodes whose keys were revoked", struck)


def _take(coordinator: Coordinator, enrolment: Enrolment, known: RosterEntry | None) -> bytes:
    revocations = Revocations(coordinator.revocations_file)
    revocations.check(enrolment)
    for other in coordinator.roster().values():
        same = {other.node_key, other.public_key} & {enrolment.node_key, enrolment.signing_key}
        if other.site != enrolment.site and same:
            raise ConfigError(
                f"{enrolment.site} brings a key of {other.site}: a folder was copied, or somebody poses as "
                "it; each site makes its own with `consilium client init`"
            )
    if coordinator.up_pid() is None:
        raise ConfigError(
            f"`consilium server up {coordinator.folder}` does not run, and a hospital's node is registered "
            "with its SuperLink; start it, then enrol again"
        )
    entry = RosterEntry(
        enrolment.site, enrolment.signing_key, enrolment.declared_size, enrolment.node_key
    )
    _register(coordinator, entry.node_key)
    kept = (entry.public_key, entry.node_key)
    former = known is not None and not {known.public_key, known.node_key} <= {*kept, ""}
    if known is not None and former:
        revocations.add(known, why=_ROTATED, keys_kept=kept)
    # After the node is registered: a site on the roster can connect.
    others = [one for one in coordinator.roster().values() if one.site != entry.site]
    Roster([*others, entry]).save(coordinator.roster_file)
    last = revocations.of_site(entry.site)
    if last is not None and last.why == _ROTATED:
        _note_once(coordinator, "rotated", entry.site, key=entry.public_key, node=entry.node_key)
    # Also what an earlier command, cut off here, left.
    _unregister_revoked(coordinator)
    key = SigningKey.load(coordinator.signing_key)
    bundle = Bundle(
        entry.site,
        coordinator.config.server.address,
        coordinator.ca.read_text(encoding="ascii"),
        key.public_hex,
        entry.public_key,
    )
    return seal_bundle(bundle, key)


def _register(coordinator: Coordinator, node_key: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".pub") as public_key:
        public_key.write(node_key.rstrip() + "\n")
        public_key.flush()
        try:
            coordinator.control().register_node(Path(public_key.name))
        except ControlError as error:
            # As it should be, if this enrolment was cut off once, or is made again.
            if PUBLIC_KEY_ALREADY_IN_USE_MESSAGE not in str(error):
                raise


def _unregister_revoked(coordinator: Coordinator) -> None:
    """Let Flower refuse every node whose key was revoked. Raises EngineError when it could not be told."""
    try:
        # Held: nothing starts a SuperLink meanwhile.
        with hold_lock(coordinator.up_lock):
            strike_revoked(coordinator)
            return
    except LockHeldError:
        pass
    keys = [one.node_key for one in Revocations(coordinator.revocations_file).all()]
    try:
        for node in registered_nodes(coordinator.superlink_database, keys).values():
            coordinator.control().unregister_node(node)
    except ControlError as error:
        raise EngineError(
            "the roster is changed, so nothing that was signed with a revoked key counts any more, but "
            f"Flower could not be told to refuse the node ({error}); give the same command again, or start "
            "`consilium server up` anew, which does it before it listens"
        ) from None


def _check_withdrawal(coordinator: Coordinator, entry: RosterEntry, said: Withdrawal) -> None:
    ours = SigningKey.load(coordinator.signing_key).public_hex
    if (said.site, said.signing_key) != (entry.site, entry.public_key):
        raise SignatureError(
            f"this withdrawal is signed by {said.site!r} with key {said.signing_key[:16]}..., which is not "
            f"the pinned one of {entry.site}; call the hospital"
        )
    if said.coordinator != ours:
        raise ConfigError(
            f"{said.site} withdraws from another coordinator (key {said.coordinator[:16]}...), not from this "
            f"one ({ours[:16]}...)"
        )


def _note_once(coordinator: Coordinator, event: str, site: str, **more: str) -> None:
    """Write a line of the audit log, unless a command that was cut off after it wrote it already."""
    fields = {"site": site, **more}
    audit = CoordinatorAudit(coordinator.folder, SigningKey.load(coordinator.signing_key))
    known = read_audit_log(audit.path) if audit.path.exists() else iter(())
    if not any(line.event == event and line.fields == fields for line in known):
        audit.note(event, **fields)


@contextmanager
def _alone(coordinator: Coordinator) -> Iterator[None]:
    """Let one of these commands at a time through."""
    try:
        with hold_lock(coordinator.folder / ".enrolling", wait_s=_OTHERS_S):
            yield
    except LockHeldError as error:
        raise CheckpointError(
            f"process {error.pid} is changing who takes part in {coordinator.folder}; try again when it is "
            "done"
        ) from None
