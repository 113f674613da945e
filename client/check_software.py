"""Is the software here what Consilium needs, and what it was tested with?"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from client.check_line import CheckLine, failed, passed, warned

_PACKAGE = "consilium"
_INSTALL = "install it again: pip install -c constraints.txt ."
# In a checkout; an installed wheel has none.
_CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
_MAX_NAMED = 5


def check_python() -> Iterator[CheckLine]:
    """Compare this Python with what the package asks for."""
    here, wanted = platform.python_version(), metadata(_PACKAGE)["Requires-Python"]
    if SpecifierSet(wanted).contains(here, prereleases=True):
        yield passed("python", f"{here} (needed: {wanted})")
    else:
        yield failed("python", f"{here}, needed: {wanted}", f"install Python {wanted}")


def check_libraries(constraints: Path = _CONSTRAINTS) -> Iterator[CheckLine]:
    """Compare installed libraries with what the package asks for, and with what was tested.

    constraints: a pip constraints file; what is not tested warns, where there is one.
    """
    needed = [
        requirement
        for requirement in map(Requirement, requires(_PACKAGE) or ())
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    wrong = [text for one in needed if (text := _mismatch(one, absent="missing"))]
    if wrong:
        yield failed("libraries", _shortened(wrong), _INSTALL)
        return
    detail = f"{len(needed)} libraries as needed"
    if not constraints.is_file():
        yield passed("libraries", detail)
        return
    tested = _requirements(constraints.read_text(encoding="utf-8"))
    # What is pinned and not installed is a developer's.
    other = [text for one in tested if (text := _mismatch(one, absent=""))]
    if other:
        yield warned(
            "libraries",
            f"not the tested versions: {_shortened(other)}",
            f"to have them, {_INSTALL}",
        )
    else:
        yield passed("libraries", f"{detail}, all in the tested versions")


def _requirements(text: str) -> list[Requirement]:
    found = []
    for line in text.splitlines():
        pinned = line.partition("#")[0].strip()
        try:
            found += [Requirement(pinned)] if pinned else []
        except InvalidRequirement:
            continue
    return found


def _mismatch(requirement: Requirement, *, absent: str) -> str:
    """Return what is wrong with one library, "" when nothing is. absent: what a missing one is called."""
    try:
        here = version(requirement.name)
    except PackageNotFoundError:
        return absent and f"{requirement.name} {absent} (needed: {requirement.specifier})"
    if requirement.specifier.contains(here, prereleases=True):
        return ""
    return f"{requirement.name} {here} (needed: {requirement.specifier})"


def _shortened(texts: list[str]) -> str:
    more = len(texts) - _MAX_NAMED
    return ", ".join(texts[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
