"""Where a run is, by its history: the round, who is in it, who was refused, what was spent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from server.history import Event


@dataclass(frozen=True, slots=True)
class Refusals:
    """How often a site's replies were refused in a run, and the last time: why, and in which round."""

    count: int
    reason: str
    round: int


@dataclass(frozen=True, slots=True)
class RunPlace:
    """Where a run is, as `RunReport` has it."""

    server_round: int
    sites: tuple[str, ...]
    replied: tuple[str, ...]
    refused: Mapping[str, str]
    refusals: Mapping[str, Refusals]
    awaiting: tuple[str, ...]
    epsilon: Mapping[str, float | None]


def run_place(events: Iterable[Event]) -> RunPlace:
    """Return where a run is. events: its history, in order."""
    server_round = 0
    sites: list[str] = []
    replied: set[str] = set()
    at_the_door: dict[str, str] = {}
    refused: dict[str, str] = {}
    refusals: dict[str, Refusals] = {}
    awaiting: set[str] = set()
    epsilon: dict[str, float | None] = {}
    for event in events:
        kind = event["event"]
        if kind in ("run-started", "resumed"):
            at_the_door, refused, awaiting = {}, {}, set()
        elif kind == "approval":
            awaiting.add(event["site"])
        elif kind == "sites":
            awaiting -= set(event["sites"])
        elif kind == "round-started":
            if event["round"] != server_round:
                replied, refused, sites = set(), {}, []
            server_round = event["round"]
            sites += [site for site in event["sites"] if site not in sites]
        elif kind == "reply":
            replied.add(event["site"])
            refused.pop(event["site"], None)
        elif kind == "refused":
            awaiting.discard(event["site"])
            before = refusals[event["site"]].count if event["site"] in refusals else 0
            refusals[event["site"]] = Refusals(before + 1, event["reason"], event["round"])
            (refused if event["round"] else at_the_door)[event["site"]] = event["reason"]
        elif kind == "round":
            epsilon = {site: row["epsilon"] for site, row in event.get("privacy", {}).items()}
    return RunPlace(
        server_round,
        tuple(sorted(sites)),
        tuple(sorted(replied)),
        {**at_the_door, **refused},
        refusals,
        tuple(sorted(awaiting)),
        epsilon,
    )
