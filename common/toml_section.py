"""What people write in TOML, as frozen models: unknown keys are errors, all bad ones named at once."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator


def kebab(name: str) -> str:
    """Return a field's name as it stands in a file: max_rank is max-rank there."""
    return name.replace("_", "-")


class TomlSection(BaseModel):
    """Base of every section of RUN.toml, site.toml and coordinator.toml."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=kebab,
        populate_by_name=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _lists_are_frozen(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


def bad_keys(error: ValidationError) -> str:
    """Return a line for each bad key: its dotted name, and what is wrong with it."""
    return "\n".join(
        f"  {'.'.join(map(str, item['loc']))}: {item['msg'].removeprefix('Value error, ')}"
        for item in error.errors()
    )
