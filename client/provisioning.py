"""Making a hospital's folder, and joining a coordinator: `consilium client init`, `join`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import tomlkit
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client.site_config import SITE_FILE, SiteConfig, load_site_config
from client.withdrawals import Withdrawals
from common.enrolment import SITE_NAME, Bundle, Enrolment, seal_enrolment
from common.errors import ConfigError
from common.files import write_atomically
from common.model_folder import digest_model
from common.signing import SigningKey, load_or_generate

ENROLMENT_FILE = "enrolment.json"

_TEMPLATE = """\
# What this hospital says about itself. This file is its own and never leaves it.
# Every key and its trade-off: deploy/README.md

[site]
name = {name}

[data]
name = {data_name}           # the ledger's key: keep it when records are added
path = {data_path}       # JSONL, CSV, Parquet, or a folder of datasets' save_to_disk
declared-size = {size}       # a public round number near the true count of units; the true one never leaves
unit = "{unit}"              # who is hidden, for this data set's whole life: patient or record
patient-id = {patient_id}    # the column that tells patients apart
delta = 1e-5                 # below 1 / units; the lower, the more epsilon the same steps count
scrub = []                   # "names", "dates", "numbers", "addresses", "emails": replaced while reading

[policy]                     # the coordinator can only ask for less
max-epsilon = 8.0            # for the data set's whole life, over all runs and coordinators
max-delta = 1e-5
require-dp = true
approval = "ask"             # every run waits for `consilium client approve RUN`; or "auto"
release-metrics = []         # "train-loss", "train-seconds" and "evaluation" are outside epsilon
allowed-models = [
{models}
]

[coordinator]                # written by `consilium client join BUNDLE`
public-key = []

[keys]
signing = "keys/signing.pem"
node = "keys/node"

[agent]
socket = "state/agent.sock"  # where the relay reaches the agent; elsewhere where another user runs it
idle-unload-s = 1800         # after so long without a task the model leaves the memory
"""
_NO_MODEL = (
    '  # { name = "llama-3b", path = "models/llama-3b", digest = "..." },'
    "   # consilium model digest PATH"
)


def init_site(
    folder: Path,
    *,
    name: str,
    declared_size: int,
    unit: str,
    patient_id: str = "",
    data: Path | None = None,
    models: Sequence[Path] = (),
) -> Enrolment:
    """Write a new hospital's folder: keys, a commented site.toml, and the enrolment to send.

    The enrolment holds public parts only. data: the records, None for records.jsonl in the folder. models:
    folders of the base models that it allows, by the folder's name.
    Raises ConfigError when the folder holds a site already, or there are no such data; ModelError for a
    folder that is no usable model.
    """
    if (folder / SITE_FILE).exists():
        raise ConfigError(
            f"{folder} holds a site already; its enrolment is {folder / ENROLMENT_FILE}. For another site "
            "choose another folder"
        )
    if not re.fullmatch(SITE_NAME, name):
        raise ConfigError(
            f"--name {name!r}: a site's name is 1 to 64 letters, digits, '.', '_' and '-', beginning with a "
            "letter or digit"
        )
    if unit == "patient" and not patient_id:
        raise ConfigError("--unit patient needs --patient-id, the column that tells patients apart")
    if data is not None and not data.exists():
        raise ConfigError(f"--data {data}: there is no such file or folder")
    allowed = [(one.resolve().name, one.resolve(), digest_model(one)) for one in models]
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    signing = load_or_generate(folder / "keys" / "signing.pem")
    node_key = make_node_key(folder / "keys" / "node")
    enrolment = Enrolment(name, declared_size, signing.public_hex, node_key)
    content = _TEMPLATE.format(
        name=_toml(name),
        data_name=_toml(f"{name}-records"),
        size=declared_size,
        unit=unit,
        patient_id=_toml(patient_id),
        data_path=_toml("records.jsonl" if data is None else str(data.resolve())),
        models="\n".join(
            f"  {{ name = {_toml(model)}, path = {_toml(str(path))}, digest = {_toml(digest)} }},"
            for model, path, digest in allowed
        )
        or _NO_MODEL,
    )
    write_atomically(folder / ENROLMENT_FILE, seal_enrolment(enrolment, signing))
    # Last: a folder without it is none, and may be made again with the same keys.
    write_atomically(folder / SITE_FILE, content.encode(), mode=0o600)
    return enrolment


def join(folder: Path, bundle: Bundle) -> SiteConfig:
    """Write a coordinator's certificate, address and key into a site's folder, keeping its comments.

    One that the site has left is taken back. Raises ConfigError when the bundle is for another site, or
    answers other keys, or when the site believes another coordinator.
    """
    path = folder / SITE_FILE
    if not path.is_file():
        raise ConfigError(
            f"no {SITE_FILE} in {folder.resolve()}; make it with `consilium client init`"
        )
    document = tomlkit.parse(path.read_text(encoding="utf-8"))
    site, section = document["site"], document["coordinator"]
    if site["name"] != bundle.site:
        raise ConfigError(
            f"this bundle is for site {bundle.site!r}, and {folder} is {site['name']!r}"
        )
    _check_own_key(folder, document, bundle)
    pinned = section.get("public-key", [])
    known = [pinned] if isinstance(pinned, str) else list(pinned)
    if known and bundle.public_key not in known:
        raise ConfigError(
            f"{path} believes another coordinator; to take this one, remove public-key from [coordinator] "
            "yourself, after comparing the fingerprint"
        )
    if not known:
        section["public-key"] = bundle.public_key
    section["address"] = bundle.address
    section["root-certificates"] = "coordinator/ca.crt"
    (folder / "coordinator").mkdir(mode=0o700, exist_ok=True)
    write_atomically(folder / "coordinator" / "ca.crt", bundle.root_certificate.encode())
    before = path.read_bytes()
    write_atomically(path, tomlkit.dumps(document).encode(), mode=0o600)
    try:
        joined = load_site_config(folder)
    except ConfigError:
        write_atomically(path, before, mode=0o600)
        raise
    Withdrawals(folder).lift(bundle.public_key)
    return joined


def _check_own_key(folder: Path, document: tomlkit.TOMLDocument, bundle: Bundle) -> None:
    """The coordinator has pinned the key that this site signs with, or none of its replies would count."""
    keys = document.get("keys", {})
    own = SigningKey.load(folder / str(keys.get("signing", "keys/signing.pem"))).public_hex
    if bundle.signing_key != own:
        raise ConfigError(
            f"this bundle answers key {bundle.signing_key[:16]}..., and {folder} signs with {own[:16]}...; "
            "send the coordinator the newest enrolment.json; if it answers rotation.json, use it so: "
            "consilium client rotate --finish BUNDLE"
        )


def make_node_key(path: Path) -> str:
    """Make a SuperNode's key, ECDSA P-384 as Flower wants it, if it is not there.

    Returns its public half in OpenSSH form, which stands beside it in a file ending in .pub.
    """
    public = path.with_suffix(".pub")
    if not path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        openssh = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        write_atomically(public, key.public_key().public_bytes(*openssh) + b"\n")
        write_atomically(path, private, mode=0o600)
    return public.read_text(encoding="ascii").strip()


def _toml(text: str) -> str:
    return tomlkit.item(text).as_string()
