"""What must hold of a run whatever was killed meanwhile, read from the files that are left.

Nothing here asks the code that ran: history, checkpoints and both sides' logs and ledgers are compared
with one another.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.ledger import Ledger, LedgerRow
from client.site_config import load_site_config
from common.audit_log import AuditEntry, read_audit_log, verify_audit_log
from common.chain import ChainHead
from common.config import RunConfig, load_run_config
from common.errors import ConsiliumError
from common.privacy import compose_epsilon
from common.signing import SigningKey
from server.history import read_events

# Two ways to compose the same charges may differ by rounding.
_SLACK = 1e-9


@dataclass(frozen=True)
class Trail:
    """Where a run left what. coordinator: its folder, with key and audit log. sites: by name."""

    run_dir: Path
    coordinator: Path
    sites: Mapping[str, Path]


@dataclass(frozen=True)
class Findings:
    """faults: what is wrong, by the check that found it; a check that found nothing has an empty list.

    rounds, replies, charges: how much was checked.
    """

    faults: Mapping[str, Sequence[str]]
    rounds: int
    replies: int
    charges: int

    @property
    def faultless(self) -> bool:
        return not any(self.faults.values())


@dataclass(frozen=True)
class _Site:
    """One hospital's side of the run: its log, and the charges of this run by task."""

    name: str
    log: list[AuditEntry]
    rows: dict[str, LedgerRow]


class _Files:
    """All of it, read once. config: of the run."""

    def __init__(self, trail: Trail) -> None:
        self.config: RunConfig = load_run_config(trail.run_dir / "run.toml")
        self.run_uid = self.config.run.uid
        self.history = read_events(trail.run_dir / "history.jsonl")
        self.audit = list(read_audit_log(trail.coordinator / "audit.jsonl"))
        self.own = [entry for entry in self.audit if entry.fields.get("run") == self.run_uid]
        self.checkpoint = _newest_checkpoint(trail.run_dir / "checkpoints")
        summary = trail.run_dir / "summary.json"
        self.summary = json.loads(summary.read_text()) if summary.exists() else None
        self.sites = [self._site(name, folder) for name, folder in sorted(trail.sites.items())]

    @property
    def committed(self) -> list[dict[str, Any]]:
        return [event for event in self.history if event["event"] == "round"]

    def coordinators(self, event: str) -> list[Mapping[str, Any]]:
        """What the coordinator's log says of this run under one kind of event."""
        return [entry.fields for entry in self.own if entry.event == event]

    def accepted(self) -> list[Mapping[str, Any]]:
        """Every finished task that the coordinator took in, also one whose round was then lost."""
        return [
            fields
            for fields in self.coordinators("reply")
            if fields["kind"] == "train" and not fields["error"]
        ]

    def _site(self, name: str, folder: Path) -> _Site:
        ledger = Ledger(folder / "state" / "ledger.sqlite")
        rows = ledger.rows(load_site_config(folder).data.name)
        return _Site(
            name,
            list(read_audit_log(folder / "state" / "audit.jsonl")),
            {row.task_id: row for row in rows if row.run_uid == self.run_uid},
        )


def check_trail(trail: Trail) -> Findings:
    """Compare everything with everything."""
    files = _Files(trail)
    faults = {name: list(check(files)) for name, check in _CHECKS.items()}
    faults["audit logs that do not verify"] = list(_unverified(trail, files))
    return Findings(
        faults,
        rounds=len(files.committed),
        replies=len(files.accepted()),
        charges=sum(len(site.rows) for site in files.sites),
    )


def _rounds_lost_or_repeated(files: _Files) -> Iterator[str]:
    """Rounds 1..n once each, and the same ones wherever they are told."""
    told = [event["round"] for event in files.committed]
    if told != list(range(1, len(told) + 1)):
        yield f"history.jsonl commits rounds {told}"
    merged = [fields["round"] for fields in files.coordinators("merged")]
    # A round whose process died between the two is completed by the next one.
    if merged != told:
        yield f"the audit log merges rounds {merged}, and history.jsonl commits {told}"
    for where, summary in (("checkpoint", files.checkpoint), ("summary.json", files.summary)):
        if summary is None:
            continue
        kept = [entry["round"] for entry in summary["rounds"]]
        if kept != told[: len(kept)] or len(told) - len(kept) > 1:
            yield f"the {where} holds rounds {kept}, and history.jsonl commits {told}"
        for entry, event in zip(summary["rounds"], files.committed, strict=False):
            if any(entry[key] != event[key] for key in ("round", "loss", "sites")):
                yield f"round {entry['round']} is another one in the {where} than in history.jsonl"


def _committed_rounds_redone(files: _Files) -> Iterator[str]:
    done = 0
    for event in files.history:
        if event["event"] == "round":
            done = event["round"]
        elif event["event"] == "round-started" and event["round"] <= done:
            yield f"round {event['round']} was started again after round {done} was committed"
    done = 0
    for entry in files.own:
        if entry.event == "merged":
            done = entry.fields["round"]
        elif entry.event == "task" and 0 < entry.fields["round"] <= done:
            yield (
                f"{entry.fields['site']} was asked for round {entry.fields['round']} after round "
                f"{done} was merged"
            )


def _updates_counted_twice(files: _Files) -> Iterator[str]:
    answered: dict[tuple[int, str], set[tuple[str, str]]] = defaultdict(set)
    for fields in files.accepted():
        answer = fields["task_id"], fields["adapter"]
        answered[fields["round"], fields["site"]].add(answer)
    rounds_of: dict[str, set[int]] = defaultdict(set)
    for place, answers in answered.items():
        if len(answers) > 1:
            yield f"round {place[0]}: {place[1]} answered {len(answers)} different things"
        for task_id, _ in answers:
            rounds_of[task_id].add(place[0])
    for task_id, rounds in rounds_of.items():
        if len(rounds) > 1:
            yield f"task {task_id[:12]} counts in rounds {sorted(rounds)}"
    for fields in files.coordinators("merged"):
        for site, times in Counter(fields["sites"]).items():
            if times > 1:
                yield f"round {fields['round']} merged {site} {times} times"
            if (fields["round"], site) not in answered:
                yield f"round {fields['round']} merged {site}, which had not answered it"
    for event in files.committed:
        if event["replies"] != len(event["sites"]):
            yield f"round {event['round']} counts {event['replies']} replies of {event['sites']}"


def _rounds_below_quorum(files: _Files) -> Iterator[str]:
    for event in files.committed:
        if len(event["sites"]) < files.config.quorum:
            yield f"round {event['round']} was merged of {len(event['sites'])} sites"


def _epsilon_under_counted(files: _Files) -> Iterator[str]:
    released: dict[str, set[str]] = defaultdict(set)
    for fields in files.accepted():
        released[fields["site"]].add(fields["task_id"])
    for site in files.sites:
        for entry in site.log:
            if entry.event == "training" and entry.fields["run"] == files.run_uid:
                yield from _uncharged(site, entry.fields)
        for task_id in sorted(released[site.name]):
            row = site.rows.get(task_id)
            if row is None or row.state != "released":
                state = "no row" if row is None else f"a row that is {row.state}"
                yield f"{site.name}: task {task_id[:12]} was answered and has {state}"
        yield from _reports_too_little(files, site)


def _uncharged(site: _Site, trained: Mapping[str, Any]) -> Iterator[str]:
    row = site.rows.get(trained["task_id"])
    if row is None:
        yield f"{site.name}: task {trained['task_id'][:12]} was trained and never charged"
    elif row.steps.steps < trained["steps"]:
        yield f"{site.name}: task {trained['task_id'][:12]} was charged fewer steps than it trained"


def _reports_too_little(files: _Files, site: _Site) -> Iterator[str]:
    """The coordinator must not believe less, nor more, than the ledger holds."""
    privacy = files.config.privacy
    for event in files.committed:
        reported = event["privacy"].get(site.name)
        if reported is None or reported["epsilon"] is None:
            continue
        rows = [row for row in site.rows.values() if row.server_round <= event["round"]]
        if sum(row.steps.steps for row in rows) < reported["steps"]:
            yield f"{site.name}, round {event['round']}: more steps are reported than charged"
    if not files.committed or site.name not in files.committed[-1]["privacy"]:
        return
    reported = files.committed[-1]["privacy"][site.name]
    if reported["epsilon"] is None:
        return
    charged = compose_epsilon(
        [row.steps for row in site.rows.values()],
        delta=privacy.target_delta,
        accountant=privacy.accountant,
    )
    if charged < reported["epsilon"] - _SLACK:
        yield f"{site.name}: epsilon {reported['epsilon']} is reported, and {charged} is charged"


def _second_outputs(files: _Files) -> Iterator[str]:
    for site in files.sites:
        task_ids = {
            entry.fields["task_sha256"]: entry.fields["task_id"]
            for entry in site.log
            if entry.event == "task"
        }
        outputs: dict[str, set[str]] = defaultdict(set)
        for entry in site.log:
            if entry.event == "sent" and entry.fields["adapter_digest"]:
                task_id = task_ids[entry.fields["task_sha256"]]
                outputs[task_id].add(entry.fields["adapter_digest"])
        for task_id, digests in outputs.items():
            if len(digests) > 1:
                yield f"{site.name} sent {len(digests)} outputs of task {task_id[:12]}"


_CHECKS: Mapping[str, Callable[[_Files], Iterator[str]]] = {
    "rounds lost or repeated": _rounds_lost_or_repeated,
    "committed rounds redone": _committed_rounds_redone,
    "updates counted twice": _updates_counted_twice,
    "rounds below quorum": _rounds_below_quorum,
    "epsilon under-counted": _epsilon_under_counted,
    "second outputs of a task": _second_outputs,
}


def _unverified(trail: Trail, files: _Files) -> Iterator[str]:
    """Each side's log, against the heads that the other side was sent."""
    given = [
        ChainHead(**entry.fields["coordinator_audit"])
        for site in files.sites
        for entry in site.log
        if entry.event == "task" and entry.fields["run"] == files.run_uid
    ]
    logs = [(trail.coordinator / "audit.jsonl", trail.coordinator / "signing.pem", given)]
    for name, folder in trail.sites.items():
        heads = [
            fields["heads"]
            for fields in files.coordinators("reply")
            if fields["site"] == name and fields["heads"] is not None
        ]
        key = load_site_config(folder).signing_key_path
        audits = [ChainHead(**head["audit"]) for head in heads]
        logs.append((folder / "state" / "audit.jsonl", key, audits))
        ledger = Ledger(folder / "state" / "ledger.sqlite")
        for head in heads:
            if not ledger.stood_at(ChainHead(**head["ledger"])):
                yield f"{name}: its ledger never stood at entry {head['ledger']['count']} as it said"
    for path, key, anchors in logs:
        public = SigningKey.load(key).public_hex
        try:
            verify_audit_log(path, public_hex=public, anchors=anchors)
        except ConsiliumError as error:
            yield str(error)


def _newest_checkpoint(folder: Path) -> dict[str, Any] | None:
    found = sorted(folder.glob("round-*"))
    if not found:
        return None
    progress: dict[str, Any] = json.loads((found[-1] / "state.json").read_text())["progress"]
    return progress
