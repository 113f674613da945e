"""What a hospital that is enrolled tells its coordinator later: new keys, or that it leaves.

    rotation    its new keys, signed by the key that the coordinator has pinned (and, inside, by the new one)
    withdrawal  that it takes no further part, signed by the pinned key

So neither needs a telephone call, and nobody else can make one.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.enrolment import Enrolment, open_enrolment, seal_enrolment
from common.errors import ProtocolError
from common.sealed import open_sealed, seal
from common.signing import ROTATION_DOMAIN, WITHDRAWAL_DOMAIN, SigningKey


@dataclass(frozen=True, slots=True)
class Rotation:
    """A hospital changes its keys. former_key: that it signs with still, 64 hex digits.

    enrolment: the file of an enrolment with the new keys, signed by the new one: whoever rotates holds both.
    """

    site: str
    former_key: str
    enrolment: str

    def opened(self) -> Enrolment:
        """Return the enrolment with the new keys. Raises as `open_enrolment`."""
        return open_enrolment(self.enrolment.encode())


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """A hospital leaves. signing_key: of the site. coordinator: the public key of the one it leaves.

    at: Unix seconds, by the hospital's clock.
    """

    site: str
    signing_key: str
    coordinator: str
    at: int


def seal_rotation(enrolment: Enrolment, *, former: SigningKey, new: SigningKey) -> bytes:
    """Return a rotation as the file that is sent. enrolment: with the new keys."""
    inner = seal_enrolment(enrolment, new).decode()
    statement = Rotation(enrolment.site, former.public_hex, inner)
    return seal(statement, former, domain=ROTATION_DOMAIN)


def open_rotation(data: bytes) -> Rotation:
    """Return the rotation in a file; whether its former key is the pinned one is for the caller to see.

    Raises ProtocolError when it is none, SignatureError when whoever made it does not hold both keys.
    """
    opened = open_sealed(data, Rotation, domain=ROTATION_DOMAIN, key="former_key")
    inside = opened.opened()
    if inside.site != opened.site:
        raise ProtocolError(
            f"this rotation is of site {opened.site[:64]!r}, and the keys in it are of {inside.site!r}"
        )
    if inside.signing_key == opened.former_key:
        raise ProtocolError("this rotation brings no new signing key; ask for it again")
    return opened


def seal_withdrawal(withdrawal: Withdrawal, key: SigningKey) -> bytes:
    """Return a withdrawal as the file that is sent, signed by the site's own key."""
    return seal(withdrawal, key, domain=WITHDRAWAL_DOMAIN)


def open_withdrawal(data: bytes) -> Withdrawal:
    """Return the withdrawal in a file; whether its key is the pinned one is for the caller to see.

    Raises ProtocolError when it is none, SignatureError when whoever made it does not hold its key.
    """
    return open_sealed(data, Withdrawal, domain=WITHDRAWAL_DOMAIN, key="signing_key")
