"""The software bill of materials of a release: CycloneDX 1.6, made by the CycloneDX library.

It lists the model, what it was made of (base and adapter) and every installed distribution that Consilium
needs, with versions and licences as their own metadata has them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import TYPE_CHECKING, Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from common.errors import ConfigError

if TYPE_CHECKING:
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component

SBOM_FILE = "sbom.cdx.json"
_ROOT = "consilium"
# Some distributions have their licence's whole text where its name belongs.
_LONGEST_NAME = 100


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What a release was made of; digests are SHA-256 in hex.

    name: of the model. base_license: "unknown" where nobody says. base: `digest_model` of the base.
    adapter: of the adapter as the run had it. files: of the release's model, path -> SHA-256.
    """

    name: str
    version: str
    base_name: str
    base_license: str
    base: str
    adapter: str
    files: Mapping[str, str]


def make_sbom(parts: ModelParts) -> str:
    """Return the list of parts as CycloneDX JSON. Raises ConfigError without the CycloneDX library."""
    try:
        output = importlib.import_module("cyclonedx.output")
    except ImportError:
        raise ConfigError(
            "the list of parts is made by the package cyclonedx-python-lib, which is not installed: "
            "pip install 'consilium[release]'"
        ) from None
    from cyclonedx.schema import OutputFormat, SchemaVersion

    bom = _bom(parts)
    made: str = output.make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(
        indent=2
    )
    return made + "\n"


def needed_distributions(root: str = _ROOT) -> dict[str, Distribution]:
    """Return the installed distributions that one needs, itself among them, by canonical name.

    What only an extra asks for is left out, unless something needs it with that extra.
    """
    found: dict[str, Distribution] = {}
    pending: list[tuple[str, frozenset[str]]] = [(root, frozenset())]
    seen: set[tuple[str, frozenset[str]]] = set()
    while pending:
        name, extras = pending.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            # Optional after all, or of another platform.
            continue
        pending += _requirements(found[name], extras)
    return dict(sorted(found.items()))


def _requirements(dist: Distribution, extras: frozenset[str]) -> list[tuple[str, frozenset[str]]]:
    needed: list[tuple[str, frozenset[str]]] = []
    for text in dist.requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            needed.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return needed


def _bom(parts: ModelParts) -> Bom:
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType

    def sha256(digest: str) -> HashType:
        return HashType(alg=HashAlgorithm.SHA_256, content=digest)

    def model_part(name: str, digest: str, covers: str, **more: Any) -> Component:
        return Component(
            type=ComponentType.MACHINE_LEARNING_MODEL,
            name=name,
            hashes=[sha256(digest)],
            properties=[Property(name="consilium:digest-covers", value=covers)],
            **more,
        )

    model = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=parts.name,
        version=parts.version,
        bom_ref="model",
        components=[
            Component(
                type=ComponentType.FILE, name=name, bom_ref=f"file:{name}", hashes=[sha256(digest)]
            )
            for name, digest in parts.files.items()
        ],
    )
    base = model_part(
        parts.base_name,
        parts.base,
        "name and SHA-256 of each config, tokenizer and safetensors file of the base model",
        bom_ref="base-model",
        licenses=_licenses(parts.base_license if parts.base_license != "unknown" else ""),
    )
    adapter = model_part(
        f"{parts.name} adapter",
        parts.adapter,
        "name, shape and float32 values of each tensor of the adapter, as the rounds had it",
        bom_ref="adapter",
    )
    libraries = {name: _library(dist) for name, dist in needed_distributions().items()}
    bom = Bom(components=[base, adapter, *libraries.values()])
    bom.metadata.component = model
    made_by = [libraries[_ROOT]] if _ROOT in libraries else []
    bom.register_dependency(model, [base, adapter, *made_by])
    for name, dist in needed_distributions().items():
        direct = {needed for needed, _ in _requirements(dist, frozenset())} & set(libraries)
        bom.register_dependency(libraries[name], [libraries[one] for one in sorted(direct)])
    return bom


def _library(dist: Distribution) -> Component:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    name = canonicalize_name(dist.metadata["Name"])
    purl = PackageURL("pypi", name=name, version=dist.version)
    return Component(
        type=ComponentType.LIBRARY,
        name=dist.metadata["Name"],
        version=dist.version,
        bom_ref=purl.to_string(),
        purl=purl,
        licenses=_licenses(license_of(dist)),
    )


def license_of(dist: Distribution) -> str:
    """Return a distribution's licence as its metadata names it: an SPDX expression or a name; "" if none."""
    metadata = dist.metadata
    expression = metadata.get_all("License-Expression")
    if expression:
        return str(expression[0])
    text = str((metadata.get_all("License") or [""])[0]).strip()
    if text and "\n" not in text and len(text) <= _LONGEST_NAME and text.upper() != "UNKNOWN":
        return text
    classified = [
        one.rsplit(" :: ", 1)[-1]
        for one in metadata.get_all("Classifier") or ()
        if one.startswith("License :: ") and one != "License :: OSI Approved"
    ]
    return " and ".join(sorted(classified))


def _licenses(name: str) -> list[Any]:
    from cyclonedx.contrib.license.factories import LicenseFactory

    return [LicenseFactory().make_from_string(name)] if name else []
