"""One line of `consilium client check`: what was looked at, how it is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["pass", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class CheckLine:
    """What one check found. detail: may hold counts; it is shown here and sent to nobody.

    state: "fail" keeps this hospital from taking part, "warn" may be meant. remedy: "" where it passed.
    """

    name: str
    state: State
    detail: str
    remedy: str = ""


def passed(name: str, detail: str) -> CheckLine:
    """Return a line with nothing to do."""
    return CheckLine(name, "pass", detail)


def warned(name: str, detail: str, remedy: str) -> CheckLine:
    """Return a line that a person should look at once."""
    return CheckLine(name, "warn", detail, remedy)


def failed(name: str, detail: str, remedy: str) -> CheckLine:
    """Return a line without which no round will work here."""
    return CheckLine(name, "fail", detail, remedy)
