"""The embedded base model: small enough to travel with the package, made by make_model."""

from __future__ import annotations

from pathlib import Path


def embedded_model_dir() -> Path:
    """Return the folder of the embedded model, as transformers' from_pretrained takes it."""
    return Path(__file__).resolve().parent / "model"
