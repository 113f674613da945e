"""`consilium client ...`: what a hospital sees and decides."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from client import cli_agent
from client.cli_agent import Json, SiteDir
from client.cli_membership import rotate, withdraw
from client.ledger_report import ledger_table, report_ledger
from client.sent import manifest_table
from common.audit_log import AuditEntry, verify_audit_log
from common.canonical import plain_json
from common.chain import ChainHead, parse_head
from common.cli import console, say
from common.config import load_run_config
from common.enrolment import open_bundle
from common.errors import ConfigError, PolicyError

if TYPE_CHECKING:
    from client.site import Site

app = typer.Typer(no_args_is_help=True, help="One hospital's own side.")
for command in (cli_agent.up, cli_agent.status, cli_agent.cancel, cli_agent.agent, cli_agent.node):
    app.command()(command)
app.command("node-init")(cli_agent.node_init)

Unit = Literal["patient", "record"]


@app.command()
def init(
    site: Annotated[Path, typer.Argument(metavar="DIR", help="The hospital's new folder.")],
    name: Annotated[str, typer.Option(help="Its name in the federation.")],
    declared_size: Annotated[
        int, typer.Option(help="A public round number near the true count of units.", min=1)
    ],
    unit: Annotated[Unit, typer.Option(help="Who is hidden: patient or record.")] = "record",
    patient_id: Annotated[str, typer.Option(help="The column that tells patients apart.")] = "",
    data: Annotated[
        Path | None, typer.Option(help="The records; default: records.jsonl in DIR.")
    ] = None,
    model: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of a base model that may be trained; may be repeated."),
    ] = None,
) -> None:
    """Make a hospital's folder: keys, a commented site.toml, and the enrolment to send."""
    from client.provisioning import ENROLMENT_FILE, init_site

    made = init_site(
        site, name=name, declared_size=declared_size, unit=unit, patient_id=patient_id,
        data=data, models=model or (),
    )  # fmt: skip
    say(
        f"Wrote {site}: site.toml, keys/, {ENROLMENT_FILE}. Send {ENROLMENT_FILE} to the coordinator; it "
        f"holds public parts only.\nFingerprint, to be compared by telephone: {made.fingerprint}\n"
        "Next: go through site.toml, and when the bundle is there: consilium client join BUNDLE --site "
        f"{site}"
    )


@app.command()
def join(
    bundle: Annotated[
        Path, typer.Argument(help="What the coordinator sent.", exists=True, dir_okay=False)
    ],
    site: SiteDir = Path(),
    yes: Annotated[bool, typer.Option("--yes", help="Fingerprints were compared.")] = False,
) -> None:
    """Believe the coordinator whose bundle this is, from now on and no other."""
    from client.provisioning import join as join_coordinator

    opened = open_bundle(bundle.read_bytes())
    say(f"{opened.address}, fingerprint {opened.fingerprint}")
    if not yes:
        typer.confirm("Has the coordinator said that this is its fingerprint?", abort=True)
    joined = join_coordinator(site, opened)
    say(
        f"Wrote {site / 'site.toml'} and {joined.root_certificates_path}. Next: consilium client up --site "
        f"{site}"
    )


@app.command()
def check(site: SiteDir = Path(), as_json: Json = False) -> None:
    """Look at everything that a round will need here; exit code 8 when something is missing."""
    from client.preflight import preflight, raise_if_failed
    from client.preflight_report import preflight_json, preflight_sentence, preflight_table

    if as_json:
        lines = list(preflight(site))
        typer.echo(preflight_json(lines))
    else:
        with console.status("") as status:
            lines = list(preflight(site, on_check=lambda name: status.update(f"Checking {name}")))
        console.print(preflight_table(lines))
        console.print(preflight_sentence(lines))
    raise_if_failed(lines)


def _open(folder: Path) -> Site:
    # Only here, because it loads torch.
    from client.site import Site

    return Site.open(folder)


@app.command()
def approve(
    run: Annotated[str, typer.Argument(help="The run; without it, what waits is listed.")] = "",
    site: SiteDir = Path(),
    decline: Annotated[bool, typer.Option(help="Refuse the run for good.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask again.")] = False,
) -> None:
    """See what a run would cost this hospital, and let it begin (policy.approval = "ask")."""
    from client.approval_report import approval_table

    opened = _open(site)
    if not run:
        waiting = opened.approvals.waiting()
        for request in waiting:
            console.print(approval_table(request, max_epsilon=opened.config.policy.max_epsilon))
        count = len(waiting)
        console.print(f"{count} run{'' if count == 1 else 's'} waiting for approval")
        return
    request = opened.approvals.find(run)
    if request.state != "waiting" and not (decline and request.state == "approved"):
        raise PolicyError(f"run {run} is {request.state} already")
    console.print(approval_table(request, max_epsilon=opened.config.policy.max_epsilon))
    if not decline and not yes:
        typer.confirm("Let this run train on this hospital's records?", abort=True)
    (opened.decline if decline else opened.approve)(run)
    verb = "Declined" if decline else "Approved"
    say(f"{verb} {run}; wrote {site / 'state' / 'approvals'}")


@app.command()
def ledger(
    site: SiteDir = Path(),
    settle: Annotated[
        Path | None,
        typer.Option(help="The coordinator's receipt, after a restore from backup."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Settle without asking.")] = False,
    as_json: Json = False,
) -> None:
    """What has been spent on this hospital's data, by run and over its whole life."""
    opened = _open(site)
    if settle is not None:
        try:
            receipt = settle.read_bytes()
        except OSError as error:
            raise ConfigError(f"{settle} cannot be read ({error.strerror})") from None
        if not yes:
            say(opened.lag(receipt).sentence())
            question = "Charge what this receipt names? Nothing takes it off again."
            typer.confirm(question, abort=True)
        settlement = opened.settle(receipt)
        say(settlement.sentence())
    with console.status("Composing epsilon"):
        report = report_ledger(opened.ledger, opened.config)
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2))
        return
    console.print(ledger_table(report))
    for line in report.sentences():
        say(line)


@app.command()
def log(
    site: SiteDir = Path(),
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every line and signature.")
    ] = False,
    anchor: Annotated[
        list[str] | None,
        typer.Option(help="COUNT:DIGEST from the coordinator's own log; may be repeated."),
    ] = None,
    what: Annotated[
        str, typer.Option(help="Show what one reply held, by the start of its manifest.")
    ] = "",
    anchors_out: Annotated[
        bool,
        typer.Option(
            "--anchors", help="Print the coordinator's heads, for `consilium server log`."
        ),
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="Every event, not only what left.")] = False,
    as_json: Json = False,
) -> None:
    """What left this hospital, and what was refused: the receipts in its audit log."""
    opened = _open(site)
    # As the user wrote it, not as it was resolved.
    path = site / opened.audit.path.relative_to(opened.config.folder)
    if what:
        manifest = opened.manifests.load(what)
        if as_json:
            typer.echo(json.dumps(manifest.as_json(), indent=2, allow_nan=False))
        else:
            console.print(manifest_table(manifest))
        return
    if anchors_out:
        for entry in opened.audit.entries():
            if entry.event == "task":
                typer.echo(str(ChainHead(**entry.fields["coordinator_audit"])))
        return
    if verify or anchor:
        anchors = [parse_head(text) for text in anchor or ()]
        seen = opened.last_seen()
        if seen is not None:
            anchors.append(seen.audit)
        verified = verify_audit_log(path, public_hex=opened.public_key, anchors=anchors)
        say(
            f"{path}: {verified.lines} lines, whole and unchanged (signed checkpoints: "
            f"{verified.checkpoints}, anchors that hold: {verified.anchors}, settled: "
            f"{verified.settled}). Head {verified.head}"
        )
        return
    entries = [entry for entry in opened.audit.entries() if every or entry.event in _SHOWN]
    if as_json:
        for entry in entries:
            typer.echo(json.dumps(plain_json(asdict(entry)), allow_nan=False))
        return
    console.print(_log_table(entries))
    say(f"{len(entries)} lines of {path}")


@app.command("dry-run")
def dry_run(
    run_file: Annotated[Path, typer.Argument(help="RUN.toml, as the coordinator gives it.")],
    site: SiteDir = Path(),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train one whole task here and show what would leave; nothing is sent or charged."""
    from client.approval_report import cost_table

    run = load_run_config(run_file, overrides=overrides or ())
    opened = _open(site)
    with _steps_bar(run.train.local_steps) as on_step:
        result = opened.dry_run(run, on_step=on_step)
    local = result.local
    if as_json:
        content = {
            "manifest": result.manifest.as_json(),
            "cost": asdict(result.cost),
            "scrubbed": local.scrubbed,
        }
        typer.echo(json.dumps(plain_json(content), indent=2, allow_nan=False))
        return
    console.print(manifest_table(result.manifest))
    console.print(cost_table(result.cost, max_epsilon=opened.config.policy.max_epsilon))
    units = f" of {len(local.patients)} patients" if local.patients is not None else ""
    console.print(
        f"Stays here: {len(local.examples)} records{units}, {local.num_skipped} skipped as "
        "incomplete"
    )
    for kind, count in sorted(local.scrubbed.items()):
        console.print(f"Replaced while reading: {count} {kind}")
    console.print("Nothing was sent and nothing was charged.")


# What the log shows without --all: what left, what was refused, what people decided.
_SHOWN = frozenset(
    {
        "sent",
        "refused",
        "waiting",
        "approved",
        "declined",
        "settled",
        "torn",
        "withdrawn",
        "key-changed",
    }
)


def _log_table(entries: Iterable[AuditEntry]) -> Table:
    table = Table(title="What left, and what was refused")
    table.add_column("line", justify="right")
    table.add_column("when", no_wrap=True)
    table.add_column("event", no_wrap=True)
    table.add_column("run", no_wrap=True)
    table.add_column("round", justify="right")
    table.add_column("what", overflow="fold")
    table.add_column("manifest", no_wrap=True)
    for entry in entries:
        when = datetime.fromtimestamp(entry.at).strftime("%Y-%m-%d %H:%M")
        fields = entry.fields
        run = str(fields.get("run", ""))[:8]
        table.add_row(
            str(entry.number), when, Text(entry.event), Text(run), str(fields.get("round", "")),
            Text(_what(entry)), str(fields.get("manifest", ""))[:12],
        )  # fmt: skip
    return table


def _what(entry: AuditEntry) -> str:
    """One entry's story in a few words."""
    fields = entry.fields
    if entry.event == "refused":
        return f"{fields.get('code')}: {fields.get('why')}"
    if entry.event != "sent":
        return ""
    lines = []
    if fields["size_bytes"]:
        lines.append(f"{fields['tensors']} tensors, {fields['size_bytes']:,} bytes")
    if fields["privacy"] is not None:
        lines.append(f"epsilon so far {fields['privacy']['epsilon']:.2f}")
    lines += [f"{name} {value:g}" for name, value in sorted(fields["numbers"].items())]
    return "\n".join(lines)


@contextmanager
def _steps_bar(total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("dry run"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("steps", total=total)
        yield lambda step: progress.update(bar, completed=step)


app.command()(rotate)
app.command()(withdraw)
