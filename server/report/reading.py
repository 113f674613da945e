"""Everything that a report is made of, read from a run's folder: one that goes, has ended, or failed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import RunConfig, Scalar, flatten, read_toml
from common.errors import ConfigError, ConsiliumError, DataError
from common.locks import lock_holder
from server.history import Event, read_events
from server.report.places import place_name, without_places
from server.report.record import Presence, RoundRecord, RunRecord, Scores, SitePrivacy
from server.report.results import Attack, Evaluation, read_attack, read_evaluation
from server.run_folder import RunFolder, holds_run, run_lock
from server.run_state import run_state

# Refusals that mean: nothing came in time. All others are of something that came.
_NOTHING_CAME = frozenset({"silent", "expired", "lost", "unanswered"})


def read_run(run_dir: Path) -> RunRecord:
    """Return what a run's folder tells. Raises ConfigError where it holds none, DataError for damage."""
    if not holds_run(run_dir):
        raise ConfigError(f"{run_dir} holds no run; give the folder that --out named")
    with damage_in_words(str(run_dir)):
        return _read(run_dir)


@contextmanager
def damage_in_words(run_dir: str) -> Iterator[None]:
    """Raise DataError for what damaged files make of whoever reads them, or draws what they say."""
    try:
        yield
    except (
        ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise DataError(
            f"run.toml, history.jsonl, summary.json or what measured the result, in {run_dir}, is not of the "
            f"form that a run writes ({type(error).__name__}); restore it from a backup"
        ) from error


def _read(run_dir: Path) -> RunRecord:
    folder = RunFolder(run_dir.resolve(), "")
    settings = _settings(run_dir / "run.toml")
    held = lock_holder(run_lock(folder.path)) is not None
    events = read_events(folder.history)
    summary = _summary(folder.summary)
    uid = str(settings.get("run.uid") or summary.get("run", ""))
    state = run_state(events, held=held)
    told = {**summary, **_told_by_history(events)} if events else summary
    entries: list[dict[str, Any]] = list(told.get("rounds", []))
    if state.kind == "finished" and summary.get("rounds"):
        # What was spent by then is in the history alone.
        spent = {one["round"]: one.get("privacy", {}) for one in entries}
        entries = [{"privacy": spent.get(e["round"], {}), **e} for e in summary["rounds"]]
    sites = _all_sites(events, entries, told)
    by_round: dict[int, list[Event]] = {}
    for event in events:
        by_round.setdefault(event.get("round", 0), []).append(event)
    rounds = tuple(_round(one, by_round.get(int(one["round"]), ()), sites) for one in entries)
    central = summary.get("central", {}) if state.kind == "finished" else {}
    evaluated = [one.scores for one in rounds if one.scores is not None]
    final = _scores(central.get("final")) or (evaluated[-1] if evaluated else None)
    planned = settings.get("train.rounds")
    return RunRecord(
        name=folder.path.name,
        uid=uid,
        state=replace(state, message=without_places(state.message)),
        settings=settings,
        rounds_planned=int(planned) if planned else state.rounds,
        sites=sites,
        base=_scores(told.get("base")) or _scores(summary.get("central", {}).get("base")),
        final=final,
        exported_round=summary.get("exported_round"),
        stopped_early=bool(summary.get("stopped_early")),
        rounds=rounds,
        privacy=_privacy(folder.path, told, settings),
        wall_s=_wall_s(events, summary, over=state.kind == "finished"),
        simulated=(folder.path / "simulation").is_dir(),
        evaluation=_own(read_evaluation(folder.path), uid),
        attack=_of_this_run(read_attack(folder.path), uid),
    )


def _own(evaluation: Evaluation | None, uid: str) -> Evaluation | None:
    """An evaluation of a run that was in this folder before says nothing of this one."""
    return None if evaluation is not None and evaluation.run not in ("", uid) else evaluation


def _of_this_run(attack: Attack | None, uid: str) -> Attack | None:
    """An audit of another run's twin says nothing of this one; a simulation's has a name, and no uid."""
    if attack is None or attack.kind != "simulated twin":
        return attack
    return None if attack.run not in ("", uid) else attack


def _settings(path: Path) -> dict[str, Scalar]:
    saved: dict[str, Scalar] = flatten(read_toml(path))
    # Of another version: what it says is shown as it is.
    with suppress(ConsiliumError):
        saved = RunConfig.parse(saved).flat()
    return {
        key: place_name(value) if isinstance(value, str) else value for key, value in saved.items()
    }


def _summary(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _told_by_history(events: Sequence[Event]) -> dict[str, Any]:
    """What summary.json would hold, of a run that goes on or broke off."""
    base: Event | None = None
    privacy: Mapping[str, Any] = {}
    rounds: dict[int, Event] = {}
    for event in events:
        kind = event["event"]
        if kind == "run-started":
            rounds, privacy = {}, {}
        elif kind == "resumed":
            rounds = {number: one for number, one in rounds.items() if number <= event["round"]}
        elif kind == "base":
            base = event
        elif kind == "round":
            rounds[event["round"]] = event
            privacy = event.get("privacy", {})
    told: dict[str, Any] = {"rounds": [rounds[number] for number in sorted(rounds)]}
    if base is not None and "loss" in base:
        told["base"] = base
    if privacy:
        told["privacy"] = privacy
    return told


def _all_sites(
    events: Sequence[Event], entries: Sequence[Mapping[str, Any]], told: Mapping[str, Any]
) -> tuple[str, ...]:
    named: set[str] = {*told.get("sites", ()), *told.get("privacy", {})}
    for entry in entries:
        named |= {*entry.get("sites", ()), *entry.get("refused", {})}
    for event in events:
        if event["event"] == "sites":
            named |= set(event["sites"])
        elif event["event"] in ("refused", "approval", "late"):
            named.add(event["site"])
    return tuple(sorted(named))


def _round(entry: Mapping[str, Any], events: Sequence[Event], sites: Sequence[str]) -> RoundRecord:
    """Return one round. events: those of its number."""
    refused = dict(entry.get("refused", {}))
    late = set()
    train_loss: dict[str, float] = {}
    train_seconds: dict[str, float] = {}
    for event in events:
        if event["event"] == "late":
            late.add(event["site"])
        elif event["event"] == "reply":
            numbers = event.get("numbers", {})
            _take(numbers.get("train-loss"), event["site"], into=train_loss)
            _take(numbers.get("train-seconds"), event["site"], into=train_seconds)
        elif event["event"] == "refused":
            refused.setdefault(event["site"], event["reason"])
    took_part = set(entry.get("sites", ()))
    presence = {
        site: _presence(site, took_part=took_part, refused=refused, late=late) for site in sites
    }
    rows = entry.get("privacy", {})
    return RoundRecord(
        number=int(entry["round"]),
        scores=_scores(entry.get("metrics")) or _scores({"loss": entry.get("loss")}),
        presence=presence,
        reasons={site: why for site, why in refused.items() if site not in took_part},
        attempts=int(entry.get("attempts", 1)),
        discarded_energy=_number(entry.get("discarded_energy")),
        bytes_up=int(entry.get("bytes_up", 0)),
        bytes_down=int(entry.get("bytes_down", 0)),
        seconds={name: float(s) for name, s in entry.get("seconds", {}).items()},
        learning_rate=_number(entry.get("learning_rate")),
        memory_bytes=entry.get("memory_bytes"),
        epsilon={site: _number(row.get("epsilon")) for site, row in rows.items()},
        train_loss=train_loss,
        train_seconds=train_seconds,
    )


def _presence(
    site: str, *, took_part: set[str], refused: Mapping[str, str], late: set[str]
) -> Presence:
    if site in took_part:
        return "took part"
    if site in late or refused.get(site) in _NOTHING_CAME:
        return "late"
    return "refused" if site in refused else "absent"


def _privacy(
    folder: Path, told: Mapping[str, Any], settings: Mapping[str, Scalar]
) -> tuple[SitePrivacy, ...]:
    calibrated = settings.get("privacy.noise-multiplier", "auto") == "auto"
    target = _number(settings.get("privacy.target-epsilon")) if calibrated else None
    rows = []
    for site, row in sorted(told.get("privacy", {}).items()):
        own = _own_cap(folder / "simulation" / "sites" / site / "site.toml")
        epsilon = _number(row.get("epsilon"))
        rows.append(
            SitePrivacy(
                site=site,
                unit=str(row.get("unit", "none")),
                epsilon=epsilon,
                delta=_number(row.get("delta")),
                noise_multiplier=_number(row.get("noise_multiplier")),
                sample_rate=_number(row.get("sample_rate")),
                steps=row.get("steps"),
                cap=own if own is not None else (target if epsilon is not None else None),
                own_cap=own is not None,
            )
        )
    return tuple(rows)


def _own_cap(site_file: Path) -> float | None:
    """What a simulated site's own policy allows, None where it says nothing."""
    try:
        cap = _number(read_toml(site_file).get("policy", {}).get("max-epsilon"))
    except ConfigError:
        return None
    return None if cap is None or cap == float("inf") else cap


def _wall_s(events: Sequence[Event], summary: Mapping[str, Any], *, over: bool) -> float:
    if over and "wall_s" in summary:
        return float(summary["wall_s"])
    times = [event["time"] for event in events if event["event"] != "requested"]
    return float(times[-1] - times[0]) if times else 0.0


def _scores(found: Mapping[str, Any] | None) -> Scores | None:
    if not found or found.get("loss") is None:
        return None
    return Scores(
        _number(found["loss"]),
        _number(found.get("perplexity")),
        _number(found.get("token_accuracy")),
    )


def _take(value: object, site: str, *, into: dict[str, float]) -> None:
    number = _number(value)
    if number is not None:
        into[site] = number


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)
