"""One inline run, measured from inside: its peak memory, and each site-round beside bare training.

`python -m simulations.bench.measure SPEC`, SPEC and the answer on standard output being JSON. A
process of its own for each run: a process's peak memory never falls.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from client.trainer import train
from common.config import RunConfig
from common.dataset import Columns, load_records
from common.lora import attached, initial_adapter
from common.model import BaseModel, choose_device, load_base
from common.prompts import resolve_template, tokenize_all
from server.history import Event
from simulations.bench.simulation import (
    DATA_SEED,
    PAIRS_PER_ROUND,
    PATIENTS_PER_SITE,
    RECORDS_PER_PATIENT,
    SETTINGS,
)
from simulations.run import Simulation, resolve_base, run_simulation
from simulations.scenario import write_synthetic_scenario
from simulations.sites import SourceSite, find_sites
from simulations.synthetic import SyntheticSpec


@dataclass(frozen=True, slots=True)
class RunSpec:
    """How many sites, and the rank of their adapter."""

    num_sites: int
    rank: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one run gave.

    site_round_s: of each site-round: task out, training, reply in, its share of merge and checkpoint.
    bare_s: of the first few of each round, the same steps on the same records and model by the
    trainer alone, right after. ratios: of those pairs.
    """

    num_sites: int
    rank: int
    adapter_mb: float
    peak_mb: float
    site_round_s: tuple[float, ...]
    bare_s: tuple[float, ...]
    ratios: tuple[float, ...]


def measure_run(spec: RunSpec) -> Measurement:
    """Return what a run of synthetic sites on the inline engine costs; nothing of it is kept."""
    config = RunConfig.parse(
        {**SETTINGS, "lora.rank": spec.rank, "federation.min-sites": spec.num_sites}
    )
    hospitals = SyntheticSpec(
        num_sites=spec.num_sites,
        patients_per_site=PATIENTS_PER_SITE,
        records_per_patient=(RECORDS_PER_PATIENT, RECORDS_PER_PATIENT),
        test_records=0,
        seed=DATA_SEED,
    )
    with tempfile.TemporaryDirectory(prefix="consilium-bench-") as folder:
        scenario = Path(folder) / "scenario"
        write_synthetic_scenario(scenario, hospitals, config)
        sources = find_sites(scenario / "sites")
        plain, model = resolve_base(config, base_dir=scenario)
        base = load_base(model.path, plain.model, device=choose_device())
        watch = _Stopwatch(config, base, {source.name: source for source in sources})
        run_simulation(
            Simulation(config, sources, Path(folder) / "run", base_dir=scenario), listener=watch
        )
    return Measurement(
        spec.num_sites,
        spec.rank,
        initial_adapter(base, config.lora, seed=0).size_bytes / 1e6,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        tuple(watch.site_round_s),
        tuple(watch.bare_s),
        tuple(watch.ratios),
    )


@dataclass(slots=True)
class _Stopwatch:
    """Listens to a run: takes each site-round's time, then that of the bare training, in turn."""

    config: RunConfig
    base: BaseModel
    sources: dict[str, SourceSite]
    site_round_s: list[float] = field(default_factory=list)
    bare_s: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    _site_s: list[float] = field(default_factory=list)
    _bare_s: list[float] = field(default_factory=list)
    _left_at: float = 0.0

    def __call__(self, event: Event) -> None:
        since_s = time.perf_counter() - self._left_at
        if event["event"] == "reply":
            self._site_s.append(since_s)
            if len(self._bare_s) < PAIRS_PER_ROUND:
                self._bare_s.append(self._train_bare(event["site"], event["round"]))
        elif event["event"] == "round":
            share_s = since_s / len(self._site_s)
            whole_s = [site_s + share_s for site_s in self._site_s]
            self.ratios += [a / b for a, b in zip(whole_s, self._bare_s, strict=False)]
            self.site_round_s += whole_s
            self.bare_s += self._bare_s
            self._site_s.clear()
            self._bare_s.clear()
        self._left_at = time.perf_counter()

    def _train_bare(self, site: str, server_round: int) -> float:
        data, base = self.config.data, self.base
        examples = tokenize_all(
            load_records(self.sources[site].data, columns=Columns()).prompts,
            tokenizer=base.tokenizer,
            template=resolve_template(data.prompt_template),
            max_length=data.max_length,
        )
        with attached(base, self.config.lora) as model:
            started = time.perf_counter()
            train(
                model,
                examples,
                settings=self.config.train,
                server_round=server_round,
                stream=site,
                pad_id=base.pad_id,
                device=base.device,
                dp=None,
            )
            return time.perf_counter() - started


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    sys.stdout.write(json.dumps(asdict(measure_run(RunSpec(**json.loads(sys.argv[1]))))))
