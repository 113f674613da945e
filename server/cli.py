"""`consilium server ...`: what a coordinator has asked and been answered, and what it can attest."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from common.audit_log import AuditEntry, read_audit_log, verify_audit_log
from common.canonical import plain_json
from common.chain import parse_head
from common.cli import INTERRUPTED, console, say, set_up_logging
from common.config import load_run_config
from common.enrolment import fingerprint
from common.errors import ConfigError, exit_code_of
from common.files import write_atomically
from common.receipts import seal_receipt
from common.records import SiteHeads
from common.signing import SigningKey
from server.audit import AUDIT_FILE, KEY_FILE, CoordinatorAudit, take_in_heads
from server.cli_attack import audit
from server.cli_evaluate import evaluate
from server.cli_membership import CoordinatorDir, enroll, renew, revoke
from server.cli_plan import plan
from server.cli_release import export, release, release_key, verify
from server.cli_report import report, run_is_done, try_report
from server.coordinator import Coordinator, load_coordinator
from server.exclusions import Exclusions
from server.following import follow_run
from server.history import read_events
from server.progress import RunProgress
from server.receipt import make_receipt
from server.run_folder import RunFolder
from server.status import coordinator_status
from server.status_tables import status_tables
from server.summary_text import summary_sentences
from server.up import run_coordinator

app = typer.Typer(no_args_is_help=True, help="The coordinator's side.")


@app.command()
def init(
    folder: CoordinatorDir,
    address: Annotated[
        str, typer.Option(help="HOST:PORT that hospitals connect to, from outside.")
    ],
    bind_host: Annotated[
        str, typer.Option(help='Listen on this instead; "0.0.0.0" is every interface.')
    ] = "",
    bind_port: Annotated[
        int,
        typer.Option(
            help="Listen on this port of loopback: an edge on this machine has HOST:PORT. 0: no edge.",
            min=0,
            max=65535,
        ),
    ] = 0,
    host: Annotated[
        list[str] | None,
        typer.Option(help="Another name or IP address of this coordinator; may be repeated."),
    ] = None,
) -> None:
    """Make a coordinator's folder: certificate authority, certificate, keys, an empty roster."""
    from server.provisioning import init_coordinator

    made = init_coordinator(
        folder, address=address, bind_host=bind_host, bind_port=bind_port, more_hosts=host or ()
    )
    key = SigningKey.load(made.signing_key)
    say(
        f"Wrote {folder}: coordinator.toml, tls/, signing.pem, release.pem, release.pub, superexec.secret, "
        "roster.json. Keep tls/ca.key and release.pem elsewhere when they are not needed.\n"
        f"Fingerprint of the key that signs tasks: {fingerprint(key.public_hex)}\n"
        f"Next: consilium server up {folder}, then consilium server enroll ENROLMENT {folder} for each "
        "hospital"
    )


app.command()(enroll)


@app.command()
def up(
    folder: CoordinatorDir,
    watch_port: Annotated[
        int | None,
        typer.Option(
            help="Serve the runs' reports, live, to this user's browser on this machine; 0: on any port "
            "that is free. Without it nothing is served.",
            min=0,
            max=65535,
        ),
    ] = None,
) -> None:
    """Run the coordinator: SuperLink, superexec, and whatever runs are asked for; until it is stopped."""
    set_up_logging(verbose=True)
    run_coordinator(load_coordinator(folder), watch_port=watch_port)
    say(f"Stopped. The coordinator's logs: {folder / 'flower'}")


app.command()(plan)


@app.command()
def run(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run's settings.")],
    folder: CoordinatorDir,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder; default: DIR/runs/NAME of the run.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the newest checkpoint.")] = False,
    force: Annotated[bool, typer.Option(help="Replace an earlier run in the folder.")] = False,
    detach: Annotated[bool, typer.Option(help="Ask for the run and do not follow it.")] = False,
) -> None:
    """Run a federation of the enrolled hospitals, and follow it; `server up` does the work."""
    # Only here, because they load torch: `up` would hold it in memory for weeks.
    from common.model import release_base
    from server.orders import check_order, order_run, require_room

    coordinator = load_coordinator(folder)
    name = run_file.stem if run_file.stem != "run" else run_file.resolve().parent.name
    run_dir = (out or folder / "runs" / name).resolve()
    require_room(coordinator, run_dir, resume=resume)
    config = load_run_config(run_file, overrides=overrides or ())
    with console.status("Checking the run"):
        checked = check_order(coordinator, config, base_dir=run_file.resolve().parent)
    opened = order_run(coordinator, checked, run_dir=run_dir, resume=resume, force=force)
    del checked
    release_base()
    say(f"Asked for run {opened.run_uid}; it writes {opened.path}")
    if coordinator.up_pid() is None:
        _warn(f"It begins when `consilium server up {folder}` runs; now it does not.")
    if detach:
        say(
            f"Watch it: consilium server status {folder}; its report: consilium server report {opened.path}"
        )
        return
    _follow(coordinator, opened, title=name, folder=folder)


def _follow(coordinator: Coordinator, run: RunFolder, *, title: str, folder: Path) -> None:
    expected = len(coordinator.roster())
    try:
        with RunProgress(title, console=console, expected_sites=expected) as listener:
            state = follow_run(coordinator, run.run_uid, listener=listener, say=_warn)
    except KeyboardInterrupt:
        say(
            f"Detached: run {run.run_uid} goes on. Watch it: consilium server status {folder}; end it: "
            f"consilium server stop {folder}"
        )
        raise typer.Exit(INTERRUPTED) from None
    if state.kind != "finished":
        _warn(f"{state.kind} ({state.code}): {state.message}")
        drawn = try_report(run.path)
        if drawn is not None:
            say(f"Wrote {drawn}: how far it came")
        raise typer.Exit(exit_code_of(state.code))
    for sentence in summary_sentences(json.loads(run.summary.read_text())):
        console.print(sentence)
    run_is_done(run.path)


def _warn(trouble: str) -> None:
    console.print(f"[yellow]{escape(trouble)}[/yellow]", soft_wrap=True)


@app.command()
def status(
    folder: CoordinatorDir,
    as_json: Annotated[bool, typer.Option("--json", help="For another program to read.")] = False,
) -> None:
    """What runs now, who is connected, how far the runs are, and what to do where something is wrong."""
    found = coordinator_status(load_coordinator(folder))
    if as_json:
        typer.echo(json.dumps(plain_json(found.as_json()), indent=2, allow_nan=False))
        return
    for part in status_tables(found):
        console.print(part)


@app.command()
def stop(folder: CoordinatorDir) -> None:
    """End the run that goes; `server run --resume` lets it go on."""
    from server.orders import stop_run

    with console.status("Stopping the run"):
        stopped = stop_run(load_coordinator(folder))
    say(
        f"Stopped run {stopped.uid} after round {stopped.state.rounds_done} of "
        f"{stopped.state.rounds or '?'}; continue with: consilium server run RUN.toml {folder} --out "
        f"{stopped.folder.path} --resume"
    )


@app.command()
def exclude(
    site: Annotated[str, typer.Argument(help="The site's name, as the roster has it.")],
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run's folder.")],
    why: Annotated[str, typer.Option(help="For whoever reads the run's folder later.")] = "",
    undo: Annotated[bool, typer.Option("--undo", help="Let it in again.")] = False,
) -> None:
    """Shut a site out of a run, also while it goes: neither asked, nor waited for, nor counted."""
    if not (run_dir / "run.toml").is_file():
        raise ConfigError(f"{run_dir} holds no run; give the folder that --out named")
    folder = RunFolder(run_dir, "")
    exclusions = Exclusions(folder.exclusions)
    if undo:
        exclusions.remove(site)
    else:
        exclusions.add(site, why=why)
        known = {name for event in read_events(folder.history) for name in event.get("sites", ())}
        if site not in known:
            named = ", ".join(sorted(known)) or "none so far"
            _warn(f"{site} has taken no part in this run until now; that did: {named}")
    excluded = ", ".join(exclusions.current()) or "nobody"
    say(
        f"Wrote {folder.exclusions}: excluded {excluded}. What goes takes it up at once; it holds for later "
        "rounds and after --resume."
    )


app.command()(evaluate)
app.command()(report)
app.command()(audit)
app.command()(revoke)
app.command()(renew)
app.command()(export)
app.command()(release)
app.command()(release_key)
app.command()(verify)


@app.command()
def log(
    folder: CoordinatorDir,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every line, signature and anchor.")
    ] = False,
    anchor: Annotated[
        list[str] | None,
        typer.Option(help="COUNT:DIGEST that a site was sent; may be repeated. Verifies."),
    ] = None,
    public_key: Annotated[
        str, typer.Option(help="Whose log it is, where signing.pem is not at hand.")
    ] = "",
    last: Annotated[int, typer.Option(help="The newest so many lines; 0 shows all.", min=0)] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="For another program to read.")] = False,
) -> None:
    """The audit log: which site was asked what, what it answered, what was made of it."""
    path = folder / AUDIT_FILE
    if verify or anchor:
        public_hex = public_key or SigningKey.load(folder / KEY_FILE).public_hex
        anchors = [parse_head(text) for text in anchor or ()]
        verified = verify_audit_log(path, public_hex=public_hex, anchors=anchors)
        seen = _last_heads(read_audit_log(path))
        if as_json:
            heads = {site: asdict(one) for site, one in seen.items()}
            typer.echo(json.dumps({**asdict(verified), "seen": heads}, indent=2))
            return
        for site, one in sorted(seen.items()):
            say(f"{site}: ledger {one.ledger}\n{site}: audit {one.audit}")
        settled = f", {verified.settled} settled after a restore" if verified.settled else ""
        say(
            f"{path}: {verified.lines} lines, whole and unchanged; {verified.checkpoints} signed "
            f"checkpoints, {verified.unsigned} lines after the last; {verified.anchors} anchors "
            f"hold{settled}. Head {verified.head}"
        )
        return
    entries = list(read_audit_log(path))
    # Minus 0 is 0: all.
    shown = entries[-last:]
    if as_json:
        for entry in shown:
            typer.echo(json.dumps(plain_json(asdict(entry)), allow_nan=False))
        return
    console.print(_log_table(shown))
    say(f"{len(shown)} of {len(entries)} lines of {path}")


@app.command()
def receipt(
    site: Annotated[str, typer.Argument(help="The site that was restored from a backup.")],
    folder: CoordinatorDir,
    out: Annotated[Path | None, typer.Option(help="Default: receipt-SITE.json.")] = None,
) -> None:
    """Attest to a restored site what this coordinator knows it has spent, so that it can go on."""
    key = SigningKey.load(folder / KEY_FILE)
    audit = CoordinatorAudit(folder, key)
    # What is attested to a hospital must not come from a log that somebody changed.
    verify_audit_log(audit.path, public_hex=key.public_hex)
    made = make_receipt(
        read_audit_log(audit.path), site=site, seen=audit.seen(), issued_at=int(time.time())
    )
    out = out or Path(f"receipt-{site}.json")
    write_atomically(out, seal_receipt(made, key))
    audit.note("receipt", site=site, heads=asdict(made.heads), charges=len(made.charges))
    say(
        f"Wrote {out}: {len(made.charges)} charges of {site}, ledger at {made.heads.ledger.count}, "
        f"audit log at {made.heads.audit.count}. There: consilium client ledger --settle {out.name}"
    )


def _last_heads(entries: Iterable[AuditEntry]) -> dict[str, SiteHeads]:
    seen: dict[str, SiteHeads] = {}
    for entry in entries:
        take_in_heads(seen, entry)
    return seen


def _log_table(entries: Sequence[AuditEntry]) -> Table:
    table = Table(box=None, header_style="bold")
    for name in ("line", "time", "event", "run", "round", "site", "what"):
        table.add_column(name, justify="right" if name in ("line", "round") else "left")
    for entry in entries:
        fields = entry.fields
        table.add_row(
            str(entry.number),
            datetime.fromtimestamp(entry.at).strftime("%Y-%m-%d %H:%M:%S"),
            entry.event,
            str(fields.get("run", ""))[:8],
            str(fields.get("round", "")),
            str(fields.get("site", "")),
            _what(entry),
        )
    return table


def _what(entry: AuditEntry) -> str:
    """One line's story in a few words."""
    fields = entry.fields
    if entry.event == "task":
        return f"{fields['kind']}, attempt {fields['attempt']}"
    if entry.event == "reply":
        said = fields["error"] or f"{fields['bytes']:,} bytes"
        heads = fields["heads"]
        if heads is None:
            return str(said)
        return f"{said}; ledger {heads['ledger']['count']}, audit {heads['audit']['count']}"
    if entry.event == "refused":
        node = f", node {fields['node']}" if "node" in fields else ""
        return f"{fields['reason']}{node}"
    if entry.event == "behind":
        heads, seen = fields["heads"], fields["seen"]
        return (
            f"ledger {heads['ledger']['count']}, was {seen['ledger']['count']}; "
            f"audit {heads['audit']['count']}, was {seen['audit']['count']}"
        )
    if entry.event in ("run-started", "resumed", "merged", "finished"):
        sites = f"{len(fields['sites'])} sites, " if "sites" in fields else ""
        return f"{sites}adapter {fields['adapter'][:12]}"
    if entry.event == "excluded":
        return ", ".join(fields["sites"]) or "nobody"
    if entry.event == "revoked":
        return str(fields["why"])
    if entry.event == "rotated":
        return f"key {fields['key'][:12]}"
    if entry.event == "late":
        return f"attempt {fields['attempt']}"
    if entry.event == "receipt":
        return f"{fields['charges']} charges"
    return str(fields.get("code", ""))
