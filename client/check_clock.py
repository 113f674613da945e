"""Is this machine's clock near the coordinator's? Tasks, certificates and Flower's own sign-in go by it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from client.check_line import CheckLine, failed, passed, warned

# Flower 1.41 signs in with the time: the SuperLink refuses one that is further ahead or behind.
AHEAD_S, BEHIND_S = 5.0, 305.0
# A Date header has whole seconds, and the answer was on its way.
_UNCERTAIN_S = 2.0
_REMEDY = (
    "set the clock, and let NTP keep it: timedatectl set-ntp true, or whatever keeps time here"
)


def is_synchronised() -> bool | None:
    """Return whether systemd says that NTP keeps the clock, None where it cannot be asked."""
    command = ["timedatectl", "show", "--property=NTPSynchronized", "--value"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {"yes": True, "no": False}.get(done.stdout.strip()) if done.returncode == 0 else None


def clock_line(
    ahead_s: float | None, *, synchronised: Callable[[], bool | None] = is_synchronised
) -> CheckLine:
    """Judge the clock. ahead_s: of the coordinator's, None where it was not heard; then NTP is asked."""
    if ahead_s is not None:
        where = "ahead of" if ahead_s > 0 else "behind"
        detail = f"{abs(ahead_s):.0f} s {where} the coordinator's"
        if not -BEHIND_S < ahead_s < AHEAD_S:
            return failed("clock", f"{detail}: the SuperLink refuses this node", _REMEDY)
        if abs(ahead_s) > _UNCERTAIN_S:
            return warned("clock", detail, _REMEDY)
        return passed("clock", "within 2 s of the coordinator's")
    kept = synchronised()
    if kept:
        return passed("clock", "kept by NTP; the coordinator was not heard")
    known = "not kept by NTP" if kept is False else "nobody here says that NTP keeps it"
    return warned("clock", f"{known}, and the coordinator was not heard", _REMEDY)
