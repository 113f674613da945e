"""What a whole run will cost this site, before it begins: epsilon, bytes, steps, hours.

All but the hours is exact and needs no weights: see common/planned_model.py.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from client.policy import planned_records
from common.config import RunConfig
from common.files import write_atomically
from common.planned_model import PlannedModel
from common.privacy import GaussianSteps, compose_epsilon

logger = logging.getLogger(__name__)

# A site trains a handful of settings in its life; what it did longest ago makes room.
_MAX_SPEEDS = 64
# Floating-point operations per parameter and token: 2 forward, 4 backward, 2 to compute it again.
_FLOPS, _FLOPS_CHECKPOINTING = 6, 8
# Share of a matrix product's speed that training reaches, with all that is not a matrix product.
_UTILISATION = 0.5


@dataclass(frozen=True, slots=True)
class RunCost:
    """What a whole run costs one site.

    unit: "record", "patient" or "none". epsilon: of all the run's steps by themselves, at the run's own
    `delta`; infinite without protection. lifetime_epsilon_after: of the data set, this run counted in, at
    data.delta. steps: optimizer steps over all rounds. bytes_down, bytes_up: adapters over all rounds; a
    signed message beside each is some kB more. hours: an estimate; hours_measured: from this site's own
    earlier rounds. more_ranks: that may come beside those in bytes_down without being trained, since a round
    sets that number under policy.max-rank and may set it late. most_bytes_down: bytes_down with all of them.
    Both are None in a request that was filed before they were counted.
    """

    unit: str
    epsilon: float
    delta: float
    lifetime_epsilon_after: float
    rounds: int
    steps: int
    bytes_down: int
    bytes_up: int
    hours: float
    hours_measured: bool
    more_ranks: int | None = None
    most_bytes_down: int | None = None


def run_cost(
    run: RunConfig,
    *,
    model: PlannedModel,
    steps: GaussianSteps,
    speeds: Speeds,
    device: torch.device,
    lifetime_epsilon_after: float,
    max_rank: int,
) -> RunCost:
    """Return what all rounds of a run cost this site.

    steps: all of the run's at this site; noise multiplier 0 is no protection. max_rank: policy.max-rank.
    The hours count every record at data.max-length. Without earlier rounds of the same kind they come from
    the device's speed at matrix products, which is rough: within a factor of about 3 from a million
    parameters up, too few by up to 7 for 260 thousand (on one idle CPU core), too many where records
    are short.
    """
    per_record_s = speeds.seconds_per_record(model, run)
    measured = per_record_s is not None
    if per_record_s is None:
        per_record_s = _probed_seconds(model, run, device=device)
    sent = model.shape.with_frozen(run.round.frozen_rank)
    more_ranks = max(0, max_rank - sent.rank)
    most = sent.with_frozen(more_ranks)
    return RunCost(
        unit=run.privacy.unit,
        epsilon=compose_epsilon(
            [steps], delta=run.privacy.target_delta, accountant=run.privacy.accountant
        ),
        delta=run.privacy.target_delta,
        lifetime_epsilon_after=lifetime_epsilon_after,
        rounds=run.train.rounds,
        steps=steps.steps,
        bytes_down=run.train.rounds * sent.safetensors_size(),
        bytes_up=run.train.rounds * model.shape.safetensors_size(),
        hours=run.train.rounds * planned_records(run) * per_record_s / 3600,
        hours_measured=measured,
        more_ranks=more_ranks,
        most_bytes_down=run.train.rounds * most.safetensors_size(),
    )


class Speeds:
    """How fast this site trained before, in one small file; a lost one costs nothing but a guess."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, model: PlannedModel, run: RunConfig, *, seconds: float) -> None:
        """Count one task's training in. seconds: of its steps, loading left out."""
        speeds, key = self._load(), _speed_key(model, run)
        records, total_s = speeds.pop(key, (0.0, 0.0))
        # Half of what was: a new machine shows within a few rounds.
        speeds[key] = (records / 2 + planned_records(run), total_s / 2 + seconds)
        newest = dict(list(speeds.items())[-_MAX_SPEEDS:])
        try:
            write_atomically(self._path, json.dumps(newest).encode(), mode=0o600)
        except OSError as error:
            # A lost guess must not cost a task that is trained and charged.
            logger.warning("%s cannot be written (%s)", self._path, error.strerror)

    def seconds_per_record(self, model: PlannedModel, run: RunConfig) -> float | None:
        """Return seconds per planned record of the same kind of training, None when there was none."""
        found = self._load().get(_speed_key(model, run))
        return None if found is None else found[1] / found[0]

    def _load(self) -> dict[str, tuple[float, float]]:
        try:
            return {
                key: (float(records), float(total_s))
                for key, (records, total_s) in json.loads(self._path.read_text()).items()
                if records > 0
            }
        except FileNotFoundError:
            return {}
        except (
            OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError,
        ):  # fmt: skip
            logger.warning("%s cannot be read; hours are estimated afresh", self._path)
            return {}


def _speed_key(model: PlannedModel, run: RunConfig) -> str:
    """Whatever makes a record slower or faster by much; the rest is noise."""
    privacy = run.privacy
    # A patient is planned at its highest number of records, which few patients have.
    per_patient = privacy.max_records_per_patient if privacy.unit == "patient" else 0
    rank = model.shape.rank + run.round.frozen_rank
    settings = (rank, run.data.max_length, run.train.gradient_checkpointing)
    return json.dumps([model.digest, run.model.quantization, *settings, per_patient])


def _probed_seconds(model: PlannedModel, run: RunConfig, *, device: torch.device) -> float:
    """Seconds per record, from the device's speed alone."""
    name = run.model.compute_dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    flops = _FLOPS_CHECKPOINTING if run.train.gradient_checkpointing else _FLOPS
    operations = flops * model.num_parameters * run.data.max_length
    return operations / (_UTILISATION * _flops_per_second(str(device), name))


@lru_cache(maxsize=8)
def _flops_per_second(device_name: str, dtype_name: str) -> float:
    """Floating-point operations per second of a matrix product; the best of three."""
    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    side = 4096 if device.type == "cuda" else 512
    matrix = torch.ones((side, side), device=device, dtype=dtype)
    best_s = math.inf
    for _ in range(3):
        started = time.perf_counter()
        # Reading one value waits for a GPU to finish.
        float((matrix @ matrix)[0, 0])
        best_s = min(best_s, time.perf_counter() - started)
    return 2 * side**3 / best_s
