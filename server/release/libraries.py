"""What is installed that Consilium needs, with versions and licences as its own metadata has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from types import MappingProxyType

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

ROOT = "consilium"
# Some distributions have their licence's whole text where its name belongs.
_LONGEST_NAME = 100


@dataclass(frozen=True, slots=True)
class Library:
    """An installed distribution. license: see `license_of`. needs: canonical names; not those of extras."""

    name: str
    version: str
    license: str
    needs: frozenset[str]


# A release asks three times, and what is installed does not change while a command runs.
@cache
def needed_libraries(root: str = ROOT) -> Mapping[str, Library]:
    """Return the installed distributions that one needs, itself among them, by canonical name.

    What only an extra asks for is left out, unless something needs it with that extra.
    """
    found: dict[str, Distribution] = {}
    pending: list[tuple[str, frozenset[str]]] = [(root, frozenset())]
    seen: set[tuple[str, frozenset[str]]] = set()
    while pending:
        name, extras = pending.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            # Optional after all, or of another platform.
            continue
        pending += _requirements(found[name], extras)
    libraries = {
        name: Library(
            dist.metadata["Name"],
            dist.version,
            license_of(dist),
            frozenset(one for one, _ in _requirements(dist, frozenset()) if one in found),
        )
        for name, dist in sorted(found.items())
    }
    return MappingProxyType(libraries)


def _requirements(dist: Distribution, extras: frozenset[str]) -> list[tuple[str, frozenset[str]]]:
    needed: list[tuple[str, frozenset[str]]] = []
    for text in dist.requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            needed.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return needed


def license_of(dist: Distribution) -> str:
    """Return a distribution's licence as its metadata names it: an SPDX expression or a name; "" if none."""
    metadata = dist.metadata
    expression = metadata.get_all("License-Expression")
    if expression:
        return str(expression[0])
    text = str((metadata.get_all("License") or [""])[0]).strip()
    if text and "\n" not in text and len(text) <= _LONGEST_NAME and text.upper() != "UNKNOWN":
        return text
    classified = [
        one.rsplit(" :: ", 1)[-1]
        for one in metadata.get_all("Classifier") or ()
        if one.startswith("License :: ") and one != "License :: OSI Approved"
    ]
    return " and ".join(sorted(classified))
