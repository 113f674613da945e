"""The software bill of materials of a release: CycloneDX 1.6, made by the CycloneDX library.

It lists the model, what it was made of (base and adapter) and every installed distribution that Consilium
needs, with versions and licences as their own metadata has them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from packaging.utils import canonicalize_name

from common.errors import ConfigError
from server.release.libraries import ROOT, Library, needed_libraries

if TYPE_CHECKING:
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component

SBOM_FILE = "sbom.cdx.json"


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
    needed = needed_libraries()
    libraries = {name: _component(one) for name, one in needed.items()}
    bom = Bom(components=[base, adapter, *libraries.values()])
    bom.metadata.component = model
    made_by = [libraries[ROOT]] if ROOT in libraries else []
    bom.register_dependency(model, [base, adapter, *made_by])
    for name, one in needed.items():
        bom.register_dependency(libraries[name], [libraries[other] for other in sorted(one.needs)])
    return bom


def _component(library: Library) -> Component:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    purl = PackageURL("pypi", name=canonicalize_name(library.name), version=library.version)
    return Component(
        type=ComponentType.LIBRARY,
        name=library.name,
        version=library.version,
        bom_ref=purl.to_string(),
        purl=purl,
        licenses=_licenses(library.license),
    )


def _licenses(name: str) -> list[Any]:
    from cyclonedx.contrib.license.factories import LicenseFactory

    return [LicenseFactory().make_from_string(name)] if name else []
