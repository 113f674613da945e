"""`consilium server enroll`, `revoke` and `renew`: who takes part, and by which certificate he is met."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from common.cli import console, say
from common.enrolment import fingerprint, open_enrolment
from common.errors import ProtocolError
from common.files import write_atomically
from common.membership import Rotation, open_rotation, open_withdrawal
from server.certificates import expires_at
from server.coordinator import Coordinator, load_coordinator
from server.membership import enrol, rotate
from server.membership import revoke as revoke_site
from server.provisioning import renew_certificate

CoordinatorDir = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="The coordinator's folder: signing.pem and audit.jsonl."),
]
_STAYS = (
    "What it gave to runs until now stays in their adapters: nothing takes an update out of a model "
    "again."
)


def enroll(
    enrolment: Annotated[
        Path,
        typer.Argument(
            help="What `consilium client init` or `client rotate` made.",
            exists=True,
            dir_okay=False,
        ),
    ],
    folder: CoordinatorDir,
    out: Annotated[Path | None, typer.Option(help="Default: bundle-SITE.json.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Fingerprints were compared.")] = False,
) -> None:
    """Take a hospital in, or its new keys, and write the bundle that it needs. `server up` must run."""
    coordinator = load_coordinator(folder)
    data = enrolment.read_bytes()
    rotation = _rotation_in(data)
    if rotation is not None and rotation.site in coordinator.roster():
        _take_rotation(coordinator, rotation, out=out)
        return
    # Who left and comes back with new keys is as new as anybody.
    opened = open_enrolment(data) if rotation is None else rotation.opened()
    say(f"{opened.site}, declared size {opened.declared_size:,}, fingerprint {opened.fingerprint}")
    if not yes:
        typer.confirm("Has the hospital said that this is its fingerprint?", abort=True)
    bundle = enrol(coordinator, opened)
    out = out or Path(f"bundle-{opened.site}.json")
    write_atomically(out, bundle)
    say(
        f"Wrote {out} and {coordinator.roster_file}: {opened.site} is enrolled. There: consilium client "
        f"{'join' if rotation is None else 'rotate --finish'} {out.name}"
    )


def revoke(
    site: Annotated[str, typer.Argument(help="The site's name, as the roster has it.")],
    folder: CoordinatorDir,
    why: Annotated[str, typer.Option(help="For whoever reads revoked.json later.")] = "",
    withdrawal: Annotated[
        Path | None,
        typer.Option(help="What `consilium client withdraw` made.", exists=True, dir_okay=False),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask again.")] = False,
) -> None:
    """Shut a hospital out for good, at once, also of a run that goes; its keys never hold again."""
    coordinator = load_coordinator(folder)
    said = None if withdrawal is None else open_withdrawal(withdrawal.read_bytes())
    if not yes:
        typer.confirm(f"Shut {site} out, for as long as it has these keys?", abort=True)
    done = revoke_site(coordinator, site, why=why, withdrawal=said)
    say(
        f"Wrote {coordinator.roster_file} and {coordinator.revocations_file}: {site} is "
        f"{'revoked, as it was before' if done.again else 'revoked'}. {_STAYS}"
    )
    if not done.node_known:
        console.print(
            f"[yellow]{site} was enrolled by an earlier version, so which node is its is not on record. "
            "Nothing it says counts, but it is still connected: find it with `consilium server status "
            f"{escape(str(folder))}`, then `flwr supernode unregister NODE`.[/yellow]",
            soft_wrap=True,
        )


def renew(
    folder: CoordinatorDir,
    ca_key: Annotated[
        Path | None, typer.Option(help="Where the CA's key is; default: DIR/tls/ca.key.")
    ] = None,
    new_key: Annotated[bool, typer.Option("--new-key", help="Make a new key as well.")] = False,
) -> None:
    """Make the SuperLink's next certificate, for the same hosts; hospitals need not be told."""
    coordinator = load_coordinator(folder)
    hosts = renew_certificate(coordinator, ca_key=ca_key, new_key=new_key)
    until = expires_at(coordinator.certificate.read_bytes())
    say(
        f"Wrote {coordinator.certificate}, good for {', '.join(hosts)} until "
        f"{datetime.fromtimestamp(until).strftime('%Y-%m-%d')}. It is used from the next start of `consilium "
        f"server up {folder}` on: end that and start it again; a run goes on by itself."
    )


def _rotation_in(data: bytes) -> Rotation | None:
    """The rotation in a file, None when it is of another kind."""
    try:
        return open_rotation(data)
    except ProtocolError:
        return None


def _take_rotation(coordinator: Coordinator, rotation: Rotation, *, out: Path | None) -> None:
    bundle = rotate(coordinator, rotation)
    out = out or Path(f"bundle-{rotation.site}.json")
    write_atomically(out, bundle)
    say(
        f"Wrote {out} and {coordinator.roster_file}: {rotation.site} has new keys, fingerprint "
        f"{fingerprint(rotation.opened().signing_key)}; the old ones, which signed for them, hold no more. "
        f"There: consilium client rotate --finish {out.name}"
    )
