"""A coordinator in a room with its sites, for tests of what they say to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from flwr.serverapp import Grid

from common.audit_log import read_audit_log
from common.config import RunConfig
from common.signing import SigningKey
from server.audit import CoordinatorAudit
from server.exclusions import EXCLUSIONS_FILE, Exclusions
from server.history import History
from server.roster import LiveRoster, Roster
from server.rounds import Federation
from server.run_context import RunContext
from tests.unit.adapters import adapter_shape, random_adapter
from tests.unit.fake_federation import Behaviour, FakeClock, FakeGrid, FakeSite

# alpha 8 at rank 4: scaling 2.
CURRENT = random_adapter(0, rank=4, scaling=2.0)
SETTINGS: dict[str, Any] = {
    "lora.rank": 4,
    "lora.alpha": 8.0,
    "federation.min-sites": 2,
    "federation.deadline-s": 60.0,
    "federation.join-timeout-s": 100.0,
    "evaluation.central-data": "/secret/test.jsonl",
}
KEY = SigningKey.generate()


class Room:
    """A Federation, its sites on nodes 2, 3, ... in order of `scripts`, and its history."""

    def __init__(
        self,
        clock: FakeClock,
        folder: Path,
        scripts: dict[str, list[Behaviour]],
        **settings: Any,
    ) -> None:
        self.clock = clock
        self.config = RunConfig.parse(
            {**SETTINGS, **{key.replace("__", "."): value for key, value in settings.items()}}
        )
        self.sites = {
            name: FakeSite(name, KEY.public_hex, script=script) for name, script in scripts.items()
        }
        self.grid = FakeGrid(dict(enumerate(self.sites.values(), start=2)), clock=clock)
        self.history = History(folder / "history.jsonl")
        self.audit = CoordinatorAudit(folder / "coordinator", KEY)
        self.exclusions = Exclusions(folder / EXCLUSIONS_FILE)
        self.roster_file = folder / "roster.json"
        self.incoming = folder / "incoming"
        self.incoming.mkdir(exist_ok=True)
        self.federation = self.open()

    def open(self, roster: Roster | None = None) -> Federation:
        """Return a coordinator as it starts; a second one stands for a resumed run."""
        roster = roster or Roster(site.entry for site in self.sites.values())
        roster.save(self.roster_file)
        run = RunContext(
            uid="run-7",
            config=self.config,
            key=KEY,
            roster=LiveRoster(roster, self.roster_file),
            base_digest="base",
            history=self.history,
            audit=self.audit,
            exclusions=self.exclusions,
            incoming=self.incoming,
        )
        return Federation(cast(Grid, self.grid), run, shape=adapter_shape(4, scaling=2.0))

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.history.events() if event["event"] == kind]

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """The fields of the coordinator's audit log's lines of a kind."""
        entries = read_audit_log(self.audit.path)
        return [dict(entry.fields) for entry in entries if entry.event == kind]
