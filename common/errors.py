"""Every error that Consilium raises on purpose, in one tree.

    ConsiliumError                  base: str(error) is a sentence for a person, .code is for the wire
    ├── ConfigError                 RUN.toml, site.toml or a command-line value is wrong
    ├── ModelError                  a base model folder or a LoRA setting does not fit
    ├── DataError                   a data set is missing, empty or malformed
    ├── ShapeError                  factors or tensors do not fit each other
    ├── SignatureError              a signature, digest or identity does not hold
    ├── ProtocolError               a message is malformed, expired or of another protocol version
    ├── PolicyError                 the site's own policy forbids the task
    ├── BudgetError                 the privacy budget does not cover the task
    ├── ApprovalError               the run waits for the hospital's approval
    ├── RestoreError                the site's ledger or log is behind what the coordinator last saw
    ├── AuditError                  an audit log was edited, cut or reordered
    ├── PrivacyError                a privacy setting is impossible or void
    ├── EgressError                 something that may not leave was about to
    ├── TrainingError               local training went wrong (adapter not finite or unmoved, time is up)
    ├── ExpiredError                a task's time was over, when it came or while it was trained
    ├── OvertakenError              a later round's task took the place of this one
    ├── CancelledError              whoever asked for a task went away, or the hospital stopped it
    ├── BusyError                   the site works on another task
    ├── DiskError                   a disk is full
    ├── PreflightError              something that a round needs is not as it should be
    ├── ScreeningError              a reply was refused by the coordinator
    ├── QuorumError                 too few sites or replies; the run stopped
    ├── CheckpointError             a checkpoint or a run folder is damaged or in the way
    ├── EngineError                 Flower's processes did not do what was asked
    └── ReleaseError                a release is not what was signed

What leaves a hospital is `code` and a correlation id, never `str(error)`: a message may name a path
or a count of the hospital's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar


class ConsiliumError(Exception):
    """Base of the tree; `code` is the only part of an error that may leave a hospital."""

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1


class ConfigError(ConsiliumError):
    """A setting that a person wrote is unknown, ill-typed, out of range or contradictory."""

    code = "config"
    exit_code = 2


class ModelError(ConsiliumError):
    """A base model folder cannot be used, or a LoRA setting does not fit it."""

    code = "model"


class DataError(ConsiliumError):
    """A data set is missing, empty or malformed. Messages give counts and line numbers, no text."""

    code = "data"


class ShapeError(ConsiliumError):
    """Factors or tensors do not fit each other."""

    code = "shape"


class SignatureError(ConsiliumError):
    """A signature, digest or identity does not hold."""

    code = "signature"


class ProtocolError(ConsiliumError):
    """A message is malformed, expired, for somebody else, or of another protocol version."""

    code = "protocol"


class PolicyError(ConsiliumError):
    """The site's own policy forbids the task."""

    code = "policy"


class BudgetError(ConsiliumError):
    """The privacy budget of a data set does not cover the task."""

    code = "budget"


class ApprovalError(ConsiliumError):
    """The run waits until the hospital approves it; asking again later is the remedy."""

    code = "approval"


class RestoreError(ConsiliumError):
    """The ledger or the audit log is behind what the coordinator last saw: it was restored or cut."""

    code = "restored"


class AuditError(ConsiliumError):
    """An audit log was edited, cut, reordered or signed by another key."""

    code = "audit"
    exit_code = 6


class PrivacyError(ConsiliumError):
    """A privacy setting is impossible, or would void the guarantee."""

    code = "privacy"


class EgressError(ConsiliumError):
    """Something that may not leave the hospital was about to."""

    code = "egress"


class TrainingError(ConsiliumError):
    """Local training went wrong: the adapter is not finite, did not move, or the time was up."""

    code = "training"


class ExpiredError(ConsiliumError):
    """A task's time was over, when it came or while it was trained: nobody waits for its reply."""

    code = "expired"


class OvertakenError(ConsiliumError):
    """A later round of the same run took this task's place; it is settled and never trained again."""

    code = "overtaken"


class CancelledError(ConsiliumError):
    """Whoever asked for a task went away, or the hospital stopped it; its charge stands."""

    code = "cancelled"


class BusyError(ConsiliumError):
    """The site works on another task; asking again later is the remedy."""

    code = "busy"


class DiskError(ConsiliumError):
    """A disk is full; what was begun goes on once there is space."""

    code = "disk"
    exit_code = 7


class PreflightError(ConsiliumError):
    """`consilium client check` found something without which no round will work."""

    code = "preflight"
    exit_code = 8


class ScreeningError(ConsiliumError):
    """A reply was refused by the coordinator; `reason` is one word for history and log."""

    code = "screening"

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class QuorumError(ConsiliumError):
    """Too few sites or replies, after the allowed retries; the run stopped."""

    code = "quorum"
    exit_code = 3


class CheckpointError(ConsiliumError):
    """A checkpoint or a run folder is damaged, or in the way of a new run."""

    code = "checkpoint"
    exit_code = 4


class EngineError(ConsiliumError):
    """Flower's processes did not start, ended early, or ended a run as failed."""

    code = "engine"
    exit_code = 5


class ReleaseError(ConsiliumError):
    """A release is not what was signed, or not by the key that is believed."""

    code = "release"
    exit_code = 9


def known_codes() -> frozenset[str]:
    """Return every code that an error of this tree can leave a hospital as."""
    return frozenset(kind.code for kind in _tree())


def exit_code_of(code: str) -> int:
    """Return the exit code that goes with an error's code; 1 where none of its own does."""
    return next((kind.exit_code for kind in _tree() if kind.code == code), 1)


def _tree() -> Iterator[type[ConsiliumError]]:
    pending = [ConsiliumError]
    while pending:
        kind = pending.pop()
        yield kind
        pending += kind.__subclasses__()
