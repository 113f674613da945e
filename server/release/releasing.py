"""A release: an export with its model card, settings and list of parts, and a signature over all of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.config import COORDINATOR_ONLY
from common.errors import CheckpointError, ReleaseError
from common.files import write_atomically
from server.export.folder import MARKER, write_marker
from server.export.model import STEPS as EXPORT_STEPS
from server.export.model import ExportReport, ExportRequest, write_export
from server.finished_run import FinishedRun
from server.release.base_license import copy_license_files, find_license
from server.release.card_facts import CardFacts, site_names
from server.release.evidence import ATTACK_FILE, EVALUATION_FILE, Evidence, load_evidence
from server.release.key import load_release_key
from server.release.model_card import CARD_FILE, make_card
from server.release.sbom import SBOM_FILE, ModelParts, make_sbom
from server.release.signature import (
    SIGNATURE,
    require_model_signing,
    sign_folder,
    verify_folder,
)
from server.run_folder import run_toml

STEPS = EXPORT_STEPS + 2
SETTINGS_FILE = "run.toml"


@dataclass(frozen=True, slots=True)
class ReleaseRequest:
    """What to release. key: release.pem. base_license: "" asks the base's folder. name: "" is the run's own.

    named_sites: whether the card calls the sites by their names.
    """

    export: ExportRequest
    key: Path
    base_license: str = ""
    name: str = ""
    named_sites: bool = False


def check_release(request: ReleaseRequest) -> Evidence:
    """Return what is known of the model; raise for whatever would fail only after all the work.

    Raises ConfigError for the key or a package that is missing, CheckpointError for damaged evidence.
    """
    load_release_key(request.key)
    require_model_signing()
    evidence = load_evidence(request.export.run)
    placeholder: dict[str, Any] = {
        "format": request.export.format,
        "dtype": request.export.dtype,
        "quantization": "",
        "measured_on": "",
        "records": 0,
        "files": {},
        **dict.fromkeys(("loss", "adapter_loss", "run_loss", "tolerance"), 0.0),
    }
    _card(request, evidence, placeholder)
    make_sbom(_parts(request, placeholder))
    return evidence


def write_release(
    request: ReleaseRequest, folder: Path, *, on_step: Callable[[str], None]
) -> ExportReport:
    """Write a release into an empty folder, sign it, and check the signature.

    on_step: is told what is done next, STEPS times. Raises as `check_release` and `write_export`.
    """
    evidence = check_release(request)
    report = write_export(request.export, folder, on_step=on_step)
    on_step("model card and list of parts")
    export: dict[str, Any] = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    contents = {
        CARD_FILE: _card(request, evidence, export),
        SETTINGS_FILE: _settings(request.export.run),
        SBOM_FILE: make_sbom(_parts(request, export)),
    }
    for name, text in contents.items():
        write_atomically(folder / name, text.encode())
    copy_license_files(request.export.base, folder)
    told = {name: value for name, value in export.items() if name not in ("form", "files")}
    write_marker(folder, told, later=frozenset({SIGNATURE}))
    on_step("signing, and checking the signature")
    sign_folder(folder, key=request.key)
    if verify_folder(folder, key=request.key).differences:
        raise ReleaseError(f"{folder} changed while it was signed; release it again")
    return report


def release_name(run: FinishedRun, name: str = "") -> str:
    """Return what a release is called: by a person, else after its base and its run."""
    return name or f"{run.base_name.rsplit('/', 1)[-1]}-consilium-{run.folder.run_uid[:8]}"


def _card(request: ReleaseRequest, evidence: Evidence, export: dict[str, Any]) -> str:
    run = request.export.run
    facts = CardFacts(
        title=release_name(run, request.name),
        run=run,
        evidence=evidence,
        export=export,
        license=find_license(request.export.base, given=request.base_license),
        names=site_names(run, named=request.named_sites),
    )
    try:
        return make_card(facts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"summary.json, {EVALUATION_FILE} or {ATTACK_FILE} in {run.folder.path} is not of the form that "
            f"a model card is made from ({type(error).__name__}: {error}); write it again, or move it away"
        ) from None


def _parts(request: ReleaseRequest, export: dict[str, Any]) -> ModelParts:
    run = request.export.run
    return ModelParts(
        name=release_name(run, request.name),
        version=version("consilium"),
        base_name=run.base_name,
        base_license=find_license(request.export.base, given=request.base_license).license,
        base=run.base_digest,
        adapter=run.adapter_digest,
        files={name: digest for name, digest in export["files"].items() if digest},
    )


def _settings(run: FinishedRun) -> str:
    """What every site was sent, and how it was merged; nothing that is the coordinator's alone."""
    flat = {
        key: value
        for key, value in run.config.flat().items()
        if not key.startswith(COORDINATOR_ONLY)
    }
    return run_toml({**flat, "model.name": run.base_name, "run.uid": run.folder.run_uid})
