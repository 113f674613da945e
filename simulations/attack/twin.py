"""The simulated twin of a coordinator's run: made-up or public records, trained on as its sites trained."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.dataset import Columns, Records, load_records
from common.errors import ConfigError, ModelError
from common.model import choose_device, load_base
from common.prompts import Prompt
from server.twin import TwinOrder
from simulations.attack.attack import Effort, Target, attack
from simulations.attack.training import plan_twin
from simulations.run import resolve_base
from simulations.synthetic import SyntheticSpec, generate_hospitals

# Of a made-up patient, in the mean: 2 to 5 records.
_RECORDS_PER_PATIENT = 3.5


def audit_twin(order: TwinOrder) -> dict[str, Any]:
    """Return the content of attack.json for the twin of a run's site.

    Raises ConfigError, DataError, ModelError, or SignatureError when the base model is another one.
    """
    named = {} if order.model is None else {"model.name": str(order.model.resolve())}
    try:
        config, model = resolve_base(order.config.replace(named), base_dir=Path())
    except ModelError as error:
        if order.model is not None:
            raise
        raise ModelError(f"{error}; --model names the base model's folder") from None
    records = _public(order.data, config) if order.data else _made_up(order)
    base = load_base(
        model.path,
        config.model,
        device=choose_device(),
        expected_digest=order.base_digest,
    )
    target = Target(
        kind="simulated twin",
        run=order.run,
        site=order.site,
        plan=plan_twin(config, declared_size=order.declared_size, rounds=order.rounds),
        records=records,
    )
    effort = Effort()
    if order.canaries is not None:
        effort = replace(effort, gradient_canaries=order.canaries)
    result = attack(target, base, effort=effort, seed=order.seed, on_progress=order.on_progress)
    return result.as_json()


def _public(path: Path, config: RunConfig) -> Records:
    records = load_records(path, columns=Columns(), split=config.data.split)
    if config.privacy.unit != "patient":
        return records
    # Public records name no patients: each is one of its own.
    return Records(records.prompts, records.num_skipped, tuple((i,) for i in range(len(records))))


def _made_up(order: TwinOrder) -> Records:
    by_patient = order.config.privacy.unit == "patient"
    patients = order.declared_size
    if not by_patient:
        patients = math.ceil(1.2 * order.declared_size / _RECORDS_PER_PATIENT) + 2
    try:
        spec = SyntheticSpec(
            num_sites=1, patients_per_site=patients, test_records=0, seed=order.seed
        )
    except ValueError as error:
        raise ConfigError(f"no twin of so many records can be made up: {error}") from None
    (rows,) = generate_hospitals(spec).sites.values()
    if not by_patient:
        rows = rows[: order.declared_size]
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.patient, []).append(place)
    prompts = tuple(Prompt(row.instruction, row.input, row.output) for row in rows)
    return Records(prompts, 0, tuple(map(tuple, places.values())))
