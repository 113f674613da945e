"""`consilium simulate ...` and `consilium demo`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from common.cli import console, say
from common.config import Scalar, flatten, load_run_config, read_toml
from common.errors import ConfigError, EngineError, QuorumError
from server.aggregation import METHODS
from server.cli_report import run_is_done, try_report
from server.history import Listener
from server.progress import RunProgress
from server.report.watching import watched
from server.run_folder import RunFolder
from server.summary_text import summary_sentences
from simulations.arms import Arm, Comparison
from simulations.cli_attack import attack
from simulations.compare import run_comparison
from simulations.comparison_table import comparison_table, methods_table
from simulations.run import EngineName, Simulation, run_simulation
from simulations.scenario import (
    TEST_SHARE,
    OwnData,
    PartitionName,
    write_own_scenario,
    write_synthetic_scenario,
)
from simulations.sites import SourceSite, find_sites, with_patients
from simulations.synthetic import SyntheticSpec

app = typer.Typer(no_args_is_help=True, help="Many hospitals on one machine, for research.")

SCENARIOS = Path(__file__).parent / "scenarios"

RunFile = Annotated[Path, typer.Argument(help="RUN.toml")]
SitesFrom = Annotated[
    Path | None,
    typer.Option(help="Folder of site folders or JSONL files; default: sites/ beside RUN.toml."),
]
PatientId = Annotated[
    str, typer.Option(help="The column that tells patients apart, for privacy.unit = patient.")
]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key=value, may be repeated.")]
Force = Annotated[bool, typer.Option(help="Replace an earlier run in the folder.")]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder to make the scenario in.")],
    sites: Annotated[int, typer.Option(help="Number of hospitals.")] = 4,
    seed: Annotated[int, typer.Option(help="Same seed, same scenario.")] = 0,
    data: Annotated[
        Path | None, typer.Option(help="Your own data set; without it, synthetic hospitals.")
    ] = None,
    partition: Annotated[PartitionName, typer.Option(help="How to cut your data.")] = "iid",
    column: Annotated[str, typer.Option(help="The column to cut by (dirichlet, column).")] = "",
    concentration: Annotated[float, typer.Option(help="Dirichlet: smaller is more skewed.")] = 0.5,
    test_share: Annotated[
        float, typer.Option(help="Share of your data held back as central test set.")
    ] = TEST_SHARE,
    site_test_share: Annotated[
        float,
        typer.Option(
            help="Share of each site's patients (of your own data: records) that it holds back for "
            "evaluation.at-sites."
        ),
    ] = 0.0,
    skew: Annotated[
        float, typer.Option(help="Synthetic hospitals: 0 alike, 1 of unlike departments.")
    ] = 0.9,
    ranks: Annotated[
        str, typer.Option(help="Ranks that the sites can hold, by turns, as 2,4,8; default: any.")
    ] = "",
) -> None:
    """Make a scenario to start from: run.toml, sites and a central test set."""
    config = load_run_config(SCENARIOS / "synthetic.toml")
    if data is None:
        if partition != "iid" or column or test_share != TEST_SHARE:
            raise ConfigError(
                "--partition, --column and --test-share cut data of your own; name it with --data, or leave "
                "them out"
            )
        try:
            spec = SyntheticSpec(num_sites=sites, seed=seed, department_skew=skew)
        except ValueError as error:
            raise ConfigError(f"{error}; see --sites, --skew and --seed") from None
        written = write_synthetic_scenario(
            folder,
            spec,
            config,
            ranks=_ranks(ranks),
            site_test_share=site_test_share,
        )
    else:
        own = OwnData(
            data,
            partition=partition,
            num_sites=sites,
            column=column,
            concentration=concentration,
            test_share=test_share,
            site_test_share=site_test_share,
            seed=seed,
        )
        written = write_own_scenario(folder, own, config, ranks=_ranks(ranks))
    say(f"Wrote {', '.join(str(path) for path in written)}")
    say(f"Next: consilium simulate run {folder / 'run.toml'}")


def _tuned(path: Path) -> dict[str, dict[str, Scalar]]:
    tree = read_toml(path)
    flat = [name for name, changes in tree.items() if not isinstance(changes, dict)]
    if flat:
        raise ConfigError(
            f"{path}: {', '.join(flat)} stands under no method; write it under one, as in "
            '["ffa with DP".train]'
        )
    return {name: flatten(changes) for name, changes in tree.items()}


def _ranks(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(f"--ranks {text!r} are not ranks of 1 or more; write them as 2,4,8")
    return tuple(map(int, words))


@app.command()
def run(
    run_file: RunFile,
    sites_from: SitesFrom = None,
    engine: Annotated[
        EngineName, typer.Option(help="inline: this process; flower: Ray, through a SuperLink.")
    ] = "inline",
    patient_id: PatientId = "",
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Default: runs/NAME of the run.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the newest checkpoint.")] = False,
    force: Force = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve the report, live, to this user's browser.")
    ] = False,
) -> None:
    """Run a federation of simulated hospitals."""
    name = _run_name(run_file)
    out = out or Path("runs") / name
    config = load_run_config(run_file, overrides=overrides or ())
    sources = _sources(run_file, sites_from, patient_id)
    simulation = Simulation(
        config=config,
        sources=sources,
        out=out,
        base_dir=run_file.resolve().parent,
        engine=engine,
        resume=resume,
        force=force,
    )
    with _saying_what_is_saved(out), _watched(out, watch=watch):
        with _progress(name, len(sources)) as listener:
            summary = run_simulation(simulation, listener=listener)
        for sentence in summary_sentences(summary):
            console.print(sentence)
        run_is_done(out)


@app.command()
def compare(
    run_file: RunFile,
    sites_from: SitesFrom = None,
    dp: Annotated[
        Path | None, typer.Option(help="TOML of what else differs in the arm with DP.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds; more show the spread.")] = 1,
    patient_id: PatientId = "",
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Default: runs/NAME-comparison.")] = None,
    pooled: Annotated[bool, typer.Option(help="Also train on all records in one place.")] = True,
    methods: Annotated[
        str,
        typer.Option(help=f"Compare ways to merge instead: all, or some of {', '.join(METHODS)}."),
    ] = "",
    tuned: Annotated[
        Path | None,
        typer.Option(
            help='TOML of what else differs by method: ["ffa with DP".train] learning-rate. '
            "Settings found on the test set that is reported favour their arm."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Keep the runs that are done, and go on.")] = False,
    force: Force = False,
) -> None:
    """Compare untouched base, each site alone, federated, federated with DP, pooled; or ways to merge."""
    out = out or Path("runs") / f"{_run_name(run_file)}-comparison"
    _compare(
        Comparison(
            config=load_run_config(run_file, overrides=overrides or ()),
            sources=tuple(_sources(run_file, sites_from, patient_id)),
            out=out,
            base_dir=run_file.resolve().parent,
            seeds=tuple(range(seeds)),
            dp_changes=flatten(read_toml(dp)) if dp else None,
            pooled=pooled,
            methods=_methods(methods),
            tuned=_tuned(tuned) if tuned else {},
            force=force,
            resume=resume,
        ),
        if_cut_off="continue with --resume",
    )


app.command()(attack)


def _methods(text: str) -> tuple[str, ...]:
    names = (
        tuple(METHODS) if text == "all" else tuple(n.strip() for n in text.split(",") if n.strip())
    )
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ConfigError(
            f"--methods {text!r}: {', '.join(unknown)} is none of {', '.join(METHODS)}; name some of them, "
            "comma-separated, or all"
        )
    return names


def _sources(run_file: Path, sites_from: Path | None, patient_id: str) -> list[SourceSite]:
    sources = find_sites(sites_from or run_file.parent / "sites")
    return with_patients(sources, column=patient_id) if patient_id else sources


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/demo"),
    force: Force = False,
) -> None:
    """Four simulated hospitals fine-tune the embedded model together, with and without DP."""
    scenario = out / "scenario"
    if force or not (scenario / "run.toml").exists():
        shutil.rmtree(scenario, ignore_errors=True)
        write_synthetic_scenario(
            scenario, SyntheticSpec(num_sites=4), load_run_config(SCENARIOS / "demo.toml")
        )
    _compare(
        Comparison(
            config=load_run_config(scenario / "run.toml"),
            sources=tuple(find_sites(scenario / "sites")),
            out=out,
            base_dir=scenario.resolve(),
            dp_changes=flatten(read_toml(SCENARIOS / "demo-dp.toml")),
            pooled=False,
            force=force,
        ),
        if_cut_off="begin anew with --force",
    )


def _run_name(run_file: Path) -> str:
    """The run file's own name, or its folder's where it is just run.toml."""
    return run_file.stem if run_file.stem != "run" else run_file.resolve().parent.name


def _compare(comparison: Comparison, *, if_cut_off: str) -> None:
    running: list[RunProgress] = []

    def watch(arm: Arm, seed: int) -> Listener:
        for earlier in running:
            earlier.__exit__(None, None, None)
        running.clear()
        title = arm.name if len(comparison.seeds) == 1 else f"{arm.name} (seed {seed})"
        view = RunProgress(f"{title:<17}", console=console, expected_sites=len(arm.sources))
        running.append(view.__enter__())
        return view

    try:
        results = run_comparison(comparison, watch=watch)
    except (KeyboardInterrupt, QuorumError, EngineError):
        done = len(list(comparison.out.glob("runs/*/*/summary.json")))
        say(f"{done} runs are done in {comparison.out}/runs; {if_cut_off}")
        raise
    finally:
        for view in running:
            view.__exit__(None, None, None)
    console.print(methods_table(results) if comparison.methods else comparison_table(results))
    say(f"Wrote {comparison.out}: comparison.csv, comparison.json, runs/ (each with its adapter)")


@contextmanager
def _progress(title: str, expected_sites: int) -> Iterator[Listener]:
    with RunProgress(title, console=console, expected_sites=expected_sites) as view:
        yield view


@contextmanager
def _watched(out: Path, *, watch: bool) -> Iterator[None]:
    if not watch:
        yield
        return
    with watched(out) as address:
        if address:
            say(f"Watch it: {address} (as long as the run goes)")
        else:
            console.print("[yellow]The report cannot be served; the run goes on[/yellow]")
        yield


@contextmanager
def _saying_what_is_saved(out: Path) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, QuorumError, EngineError) as error:
        rounds = sorted(path.name for path in out.glob("checkpoints/round-*"))
        if rounds:
            say(f"Saved so far: {out}/checkpoints/{rounds[-1]}; continue with --resume")
        if RunFolder(out, "").history.is_file() and not isinstance(error, KeyboardInterrupt):
            drawn = try_report(out)
            if drawn is not None:
                say(f"Wrote {drawn}: how far it came")
        raise
