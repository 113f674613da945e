"""site.toml: what a hospital says about itself. It is the site's own file and never leaves it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
)

from common.config import read_toml
from common.errors import ConfigError

SITE_FILE = "site.toml"
SiteName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
PublicKeyHex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
    )


class SiteSection(_Section):
    """Who this site is, to the coordinator."""

    name: SiteName


class ColumnsSection(_Section):
    """What the data set calls its columns."""

    instruction: str = "instruction"
    # Missing in the data: every prompt has an empty input.
    input: str = "input"
    output: str = "output"
    # Missing in the data: every row is used, whatever data.split says.
    split: str = "split"


class DataSection(_Section):
    """The data set: where it is, what it is called in the ledger, and its public size."""

    # The ledger's key. Keep it when records are added: a budget belongs to the patients in it.
    name: str
    # JSONL, CSV or Parquet; relative to this folder.
    path: str
    columns: ColumnsSection = Field(default_factory=ColumnsSection)
    # A public round number near the true count. It sets the sampling rate and this site's weight;
    # the true count never leaves.
    declared_size: int = Field(ge=1)
    # What one unit of privacy is in this data set, for its whole life.
    unit: Literal["record"] = "record"
    # The delta at which this data set's lifetime epsilon is counted.
    delta: float = Field(1e-5, gt=0, lt=1)


class AllowedModel(_Section):
    """A base model that this site will train, held in a folder of its own."""

    name: str
    path: str
    digest: PublicKeyHex


class PolicySection(_Section):
    """What this site will do at all. The coordinator can only ask for less."""

    # Lifetime epsilon of the data set, over all runs and coordinators. `inf` is no cap.
    max_epsilon: float = Field(gt=0)
    max_delta: float = Field(1e-5, gt=0, lt=1)
    # Refuse every task without differential privacy.
    require_dp: bool = True
    allowed_models: tuple[AllowedModel, ...]
    max_rank: int = Field(64, ge=1)
    # Optimizer steps of one task.
    max_steps: int = Field(10_000, ge=1)
    # Numbers that may leave beside the adapter. "train-loss" is outside epsilon: it speaks of the
    # records themselves.
    release_metrics: tuple[Literal["train-loss", "train-seconds"], ...] = ()

    @field_validator("allowed_models", "release_metrics", mode="before")
    @classmethod
    def _lists_are_frozen(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


class KeysSection(_Section):
    """This site's own keys, relative to this folder."""

    signing: str = "keys/signing.pem"


class CoordinatorSection(_Section):
    """Whose tasks this site believes: an Ed25519 public key, 64 hex digits."""

    public_key: PublicKeyHex


class DeviceSection(_Section):
    """Where training runs: "auto", "cpu", "cuda", "cuda:1"..."""

    name: str = "auto"


class SiteConfig(_Section):
    """The whole of site.toml, and the folder it lies in."""

    site: SiteSection
    data: DataSection
    policy: PolicySection
    coordinator: CoordinatorSection
    keys: KeysSection = Field(default_factory=KeysSection)
    device: DeviceSection = Field(default_factory=DeviceSection)
    folder: Path = Field(default=Path(), exclude=True)

    @property
    def data_path(self) -> Path:
        """Where the records are."""
        return self.folder / self.data.path

    @property
    def signing_key_path(self) -> Path:
        """Where this site's private signing key is."""
        return self.folder / self.keys.signing

    @property
    def models(self) -> dict[str, Path]:
        """Allowed model names -> folders."""
        return {model.name: self.folder / model.path for model in self.policy.allowed_models}


def load_site_config(folder: Path) -> SiteConfig:
    """Return the site.toml of a site folder. Raises ConfigError naming every bad key at once."""
    path = folder / SITE_FILE
    try:
        config = SiteConfig.model_validate(read_toml(path))
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(part) for part in item['loc'])}: {item['msg']}"
            for item in error.errors()
        ]
        raise ConfigError(f"{path} is not usable:\n" + "\n".join(lines)) from None
    if math.isnan(config.policy.max_epsilon):
        raise ConfigError(f"{path}: policy.max-epsilon is not a number")
    return config.model_copy(update={"folder": folder.resolve()})
