"""How long a run will take, from the rounds of earlier ones with the same base model.

Training is scaled by what is trained: steps x batch x tokens of a record. The rest of a round, waiting,
merging and evaluating, is taken as it was. Without a comparable round nothing is guessed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from common.config import RunConfig, flatten, read_toml
from common.errors import ConfigError
from server.runs import AskedRun

# Of the newest runs that compare: an older one may have had other machines.
_MOST_RUNS = 3


@dataclass(frozen=True, slots=True)
class TimeEstimate:
    """Seconds of a whole run, None where no earlier round compares. rounds: that it was estimated from.

    training_told: whether sites released how long they trained; else all of a round's wait is scaled.
    """

    seconds: float | None
    rounds: int
    training_told: bool

    def sentence(self) -> str:
        """The estimate and how it was made, in words."""
        if self.seconds is None:
            return "unknown until a first round: no earlier run of this coordinator had this base model"
        how = (
            "the sites' own training seconds" if self.training_told
            else "the whole wait for replies, since sites do not release their training seconds,"
        )  # fmt: skip
        return (
            f"about {_span(self.seconds)}, roughly: the median of {self.rounds} earlier "
            f"round{'' if self.rounds == 1 else 's'} with this base model, {how} scaled by steps x batch x "
            "length"
        )


def estimate_time(config: RunConfig, *, base_digest: str, runs: Sequence[AskedRun]) -> TimeEstimate:
    """Return how long a run will take. runs: of this coordinator, the one asked for last at the end."""
    seconds: list[float] = []
    told: list[bool] = []
    comparable = [run for run in reversed(runs) if _base(run) == base_digest]
    for run in comparable[:_MOST_RUNS]:
        try:
            before = RunConfig.parse(flatten(read_toml(run.folder.path / "run.toml")))
        except ConfigError:
            # Of another version; it tells nothing.
            continue
        scale = _work(config) / _work(before)
        for phases in _rounds(run):
            train_s, wait_s = float(phases["train"]), float(phases["wait"])
            rest_s = float(phases["merge"]) + float(phases["evaluate"])
            told.append(train_s > 0)
            trained_s = train_s * scale + wait_s if train_s > 0 else wait_s * scale
            seconds.append(trained_s + rest_s)
    if not seconds:
        return TimeEstimate(None, 0, training_told=False)
    whole_s = config.train.rounds * statistics.median(seconds)
    return TimeEstimate(whole_s, len(seconds), training_told=all(told))


def _base(run: AskedRun) -> str:
    """The digest of the base model that a run began with, "" before it began."""
    began = (event for event in run.events if event["event"] == "run-started")
    return str(next(began, {}).get("base", ""))


def _rounds(run: AskedRun) -> Iterator[dict[str, Any]]:
    for event in run.events:
        if event["event"] == "round":
            yield event["seconds"]


def _work(config: RunConfig) -> int:
    """Tokens of one task, at most; patients count with all the records that they may have."""
    per_unit = config.privacy.max_records_per_patient if config.privacy.unit == "patient" else 1
    train = config.train
    return train.local_steps * train.batch_size * per_unit * config.data.max_length


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
