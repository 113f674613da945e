"""`consilium client check`: everything that a round will need, looked at before the first one.

Nothing is sent but one GET /health to the coordinator, and nothing is written. A check that breaks is a
line that says so: one missing library hides none of the others.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from client.check_clock import clock_line
from client.check_data import check_data
from client.check_device import check_device
from client.check_keys import check_keys
from client.check_line import CheckLine, failed, passed
from client.check_model import check_disk, check_models
from client.check_network import reach_coordinator
from client.check_policy import check_policy
from client.check_software import check_libraries, check_python
from client.site_config import SITE_FILE, SiteConfig, load_site_config
from common.errors import ConsiliumError, PreflightError

_Lines = Iterable[CheckLine]

# In the order in which a person would mend what they find.
_SOFTWARE: dict[str, Callable[[], _Lines]] = {
    "python": check_python,
    "libraries": check_libraries,
}


def _check_coordinator(config: SiteConfig) -> _Lines:
    reach = reach_coordinator(config)
    return (*reach.lines, clock_line(reach.ahead_s))


_SITE: dict[str, Callable[[SiteConfig], _Lines]] = {
    "policy": check_policy,
    "keys": check_keys,
    "models": check_models,
    "data": check_data,
    "device": check_device,
    "disk": check_disk,
    "coordinator": _check_coordinator,
}


def preflight(
    folder: Path, *, on_check: Callable[[str], None] = lambda name: None
) -> Iterator[CheckLine]:
    """Yield what every check finds in a site's folder, never an error.

    on_check: is told each check's name when it begins; some take a minute.
    """
    for name, check in _SOFTWARE.items():
        on_check(name)
        yield from _guarded(name, check)
    try:
        config = load_site_config(folder)
    except OSError as error:
        yield failed(
            SITE_FILE,
            f"cannot be read ({error.strerror})",
            "run this as the user that owns the folder",
        )
        return
    except ConsiliumError as error:
        yield failed(
            SITE_FILE,
            str(error),
            "`consilium client init` makes it and `consilium client join` completes it; then check again",
        )
        return
    yield passed(SITE_FILE, f"{config.site.name}, every key is known")
    for name, check_site in _SITE.items():
        on_check(name)
        yield from _guarded(name, partial(check_site, config))


def raise_if_failed(lines: Iterable[CheckLine]) -> None:
    """Raise PreflightError, naming each check that failed."""
    failures = [line.name for line in lines if line.state == "fail"]
    if failures:
        raise PreflightError(
            f"failed: {', '.join(failures)}; do what stands beside each, and check again"
        )


def _guarded(name: str, check: Callable[[], _Lines]) -> _Lines:
    """Return a check's lines, or one that says how it broke: without the message, which may quote data."""
    try:
        return tuple(check())
    except ConsiliumError as error:
        return (failed(name, str(error), "mend what it names, and check again"),)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return (
            failed(
                name,
                f"the check itself broke: {type(error).__name__} at {Path(place.filename).name} line "
                f"{place.lineno}",
                "install Consilium again if a library is at fault, or report it with this line",
            ),
        )
