"""The list of parts: valid CycloneDX 1.6, with all that Consilium needs and the model's own parts."""

from __future__ import annotations

import json
import sys
from email.message import Message
from typing import Any

import pytest

from common.errors import ConfigError
from server.release.libraries import license_of, needed_libraries
from server.release.sbom import ModelParts, make_sbom

PARTS = ModelParts(
    name="model-x",
    version="0.1.0",
    base_name="org/base",
    base_license="apache-2.0",
    base="ab" * 32,
    adapter="cd" * 32,
    files={"model.safetensors": "ef" * 32},
)


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(make_sbom(PARTS))
    return content


def test_it_is_valid_by_the_strict_schema() -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    text = make_sbom(PARTS)
    assert validator.validate_str(text) is None
    broken = text.replace('"type": "library"', '"type": "book"')
    assert validator.validate_str(broken) is not None


def test_it_names_the_model_and_what_it_was_made_of_with_their_digests(
    made: dict[str, Any],
) -> None:
    assert (made["bomFormat"], made["specVersion"]) == ("CycloneDX", "1.6")
    model = made["metadata"]["component"]
    assert (model["type"], model["name"]) == ("machine-learning-model", "model-x")
    assert model["components"][0]["hashes"] == [{"alg": "SHA-256", "content": "ef" * 32}]
    parts = {one["bom-ref"]: one for one in made["components"]}
    assert parts["base-model"]["name"] == "org/base"
    assert parts["base-model"]["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    assert parts["base-model"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert parts["adapter"]["hashes"] == [{"alg": "SHA-256", "content": "cd" * 32}]


def test_it_names_every_distribution_that_consilium_needs(made: dict[str, Any]) -> None:
    parts = {one["bom-ref"]: one for one in made["components"]}
    libraries = {one["name"].lower() for one in parts.values() if one["type"] == "library"}
    assert {"consilium", "torch", "transformers", "peft", "flwr", "opacus"} <= libraries
    # What only developers need is no part of a model.
    assert not {"pytest", "ruff", "mypy"} & libraries
    import torch

    [version] = {one["version"] for one in parts.values() if one["name"] == "torch"}
    assert version == torch.__version__
    assert parts[f"pkg:pypi/torch@{version.replace('+', '%2B')}"]["licenses"]
    depends = {one["ref"]: one.get("dependsOn", []) for one in made["dependencies"]}
    assert {"base-model", "adapter"} <= set(depends["model"])
    [consilium] = [ref for ref in depends if ref.startswith("pkg:pypi/consilium@")]
    assert any(ref.startswith("pkg:pypi/peft@") for ref in depends[consilium])


def test_most_parts_have_a_licence(made: dict[str, Any]) -> None:
    libraries = [one for one in made["components"] if one["type"] == "library"]
    without = [one["name"] for one in libraries if not one.get("licenses")]
    assert len(libraries) > 50
    assert len(without) < len(libraries) / 10, without


def test_a_base_of_unknown_licence_has_none() -> None:
    from dataclasses import replace

    made = json.loads(make_sbom(replace(PARTS, base_license="unknown")))
    [base] = [one for one in made["components"] if one["bom-ref"] == "base-model"]
    assert "licenses" not in base


class _Distribution:
    """One whose metadata is given."""

    def __init__(self, *fields: tuple[str, str]) -> None:
        self.metadata = Message()
        for name, value in fields:
            self.metadata[name] = value


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([("License-Expression", "MIT OR Apache-2.0"), ("License", "x")], "MIT OR Apache-2.0"),
        ([("License", "BSD-3-Clause")], "BSD-3-Clause"),
        (
            [("License", "UNKNOWN"), ("Classifier", "License :: OSI Approved :: MIT License")],
            "MIT License",
        ),
        (
            [
                ("License", "Copyright (c) 2005, somebody\n " + "word " * 300),
                ("Classifier", "License :: OSI Approved"),
                ("Classifier", "License :: OSI Approved :: BSD License"),
                ("Classifier", "Programming Language :: Python"),
            ],
            "BSD License",
        ),
        # A whole text, on one line.
        ([("License", "Permission is hereby granted " * 9)], ""),
        ([], ""),
    ],
)
def test_a_licence_is_taken_from_the_metadata(fields: list[tuple[str, str]], expected: str) -> None:
    assert license_of(_Distribution(*fields)) == expected  # type: ignore[arg-type]


def test_what_only_an_extra_needs_is_left_out() -> None:
    found = needed_libraries()
    assert "model-signing" not in found
    assert "ray" in found  # of flwr[simulation], which we ask for with that extra


def test_without_its_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cyclonedx.output", None)
    with pytest.raises(ConfigError, match=r"pip install 'consilium\[release\]'"):
        make_sbom(PARTS)
