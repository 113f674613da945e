"""`consilium simulate attack`: how leaky one site's training is, as a run would train it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.cli import console, say
from common.config import load_run_config
from common.errors import ConfigError
from common.model import choose_device, load_base
from server.attack_progress import AttackProgress
from server.attack_report import say_attack, write_attack
from simulations.attack.attack import Effort, Target
from simulations.attack.attack import attack as run_attack
from simulations.attack.training import plan_twin
from simulations.run import resolve_base
from simulations.sites import SourceSite, declared_size, find_sites, site_records, with_patients


def attack(
    run_file: Annotated[Path, typer.Argument(help="RUN.toml")],
    sites_from: Annotated[
        Path | None,
        typer.Option(
            help="Folder of site folders or JSONL files; default: sites/ beside RUN.toml."
        ),
    ] = None,
    site: Annotated[str, typer.Option(help="Whom to attack; default: the largest site.")] = "",
    patient_id: Annotated[
        str, typer.Option(help="The column that tells patients apart, for privacy.unit = patient.")
    ] = "",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Default: runs/NAME-attack of the run.")] = None,
    seed: Annotated[int, typer.Option(help="Of the auditor's coins; never of the noise.")] = 0,
    canaries: Annotated[
        int, typer.Option(help="Gradient canaries; more bound epsilon better.", min=20)
    ] = Effort().gradient_canaries,
) -> None:
    """Attack one site: bounds on epsilon, membership inference, planted identifiers.

    The site trains alone with the run's settings, on half of its records beside canaries: an audit of the
    training pipeline, not of one model.
    """
    name = run_file.stem if run_file.stem != "run" else run_file.resolve().parent.name
    config = load_run_config(run_file, overrides=overrides or ())
    config, model = resolve_base(config, base_dir=run_file.resolve().parent)
    sources = find_sites(sites_from or run_file.parent / "sites")
    if patient_id:
        sources = with_patients(sources, column=patient_id)
    sizes = {one.name: declared_size(one, config=config) for one in sources}
    source = _chosen(sources, sizes, site)
    target = Target(
        kind="simulation",
        run=name,
        site=source.name,
        plan=plan_twin(config, declared_size=sizes[source.name]),
        records=site_records(source, config=config),
    )
    base = load_base(model.path, config.model, device=choose_device(), expected_digest=model.digest)
    with AttackProgress(console) as progress:
        result = run_attack(
            target,
            base,
            effort=Effort(gradient_canaries=canaries),
            seed=seed,
            on_progress=progress,
        )
    content = result.as_json()
    say_attack(content, console)
    written = write_attack(out or Path("runs") / f"{name}-attack", content)
    say(f"Wrote {written}")


def _chosen(sources: list[SourceSite], sizes: dict[str, int], site: str) -> SourceSite:
    name = site or max(sizes, key=lambda one: sizes[one])
    found = next((source for source in sources if source.name == name), None)
    if found is None:
        raise ConfigError(f"--site {site!r} is none of {', '.join(sizes)}")
    return found
