"""site.toml: what a hospital says about itself. It is the site's own file and never leaves it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationError, model_validator

from common.address import HostPort
from common.config import read_toml
from common.enrolment import SITE_NAME
from common.errors import ConfigError
from common.toml_section import TomlSection, bad_keys

SITE_FILE = "site.toml"
SiteName = Annotated[str, StringConstraints(pattern=f"^{SITE_NAME}$")]
IdentifierKind = Literal["names", "dates", "numbers", "addresses", "emails"]
PublicKeyHex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class SiteSection(TomlSection):
    """Who this site is, to the coordinator."""

    name: SiteName


class ColumnsSection(TomlSection):
    """What the data set calls its columns."""

    instruction: str = "instruction"
    # Missing in the data: every prompt has an empty input.
    input: str = "input"
    output: str = "output"
    # Missing in the data: every row is used, whatever data.split says.
    split: str = "split"


class DataSection(TomlSection):
    """The data set: where it is, what it is called in the ledger, and its public size."""

    # The ledger's key. Keep it when records are added: a budget belongs to the patients in it.
    name: str
    # JSONL, CSV or Parquet; relative to this folder.
    path: str
    columns: ColumnsSection = Field(default_factory=ColumnsSection)
    # A public round number near the true count of units (patients, or records). It sets the sampling
    # rate and this site's weight; the true count never leaves.
    declared_size: int = Field(ge=1)
    # What one unit of privacy is in this data set, for its whole life.
    unit: Literal["record", "patient"] = "record"
    # The column that tells patients apart; needed for unit "patient". It never leaves the loader.
    patient_id: str = ""
    # The rows of this split, never trained on, are what a coordinator may have counted (release-metrics
    # "evaluation"). The site says which they are, no task does.
    evaluation_split: str = Field("test", min_length=1)
    # The delta at which this data set's lifetime epsilon is counted.
    delta: float = Field(1e-5, gt=0, lt=1)
    # Direct identifiers that are replaced while records are read.
    scrub: tuple[IdentifierKind, ...] = ()
    # Columns that hold people's names: each of them, and each of its parts, goes from its record's text.
    # Exact where the scrub of names alone guesses; every record must have them.
    name_columns: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _names_are_scrubbed_where_columns_hold_them(self) -> DataSection:
        if self.name_columns and "names" not in self.scrub:
            raise ValueError('name-columns needs "names" in scrub')
        return self

    @model_validator(mode="after")
    def _patients_can_be_told_apart(self) -> DataSection:
        if self.unit == "patient" and not self.patient_id:
            raise ValueError(
                'unit = "patient" needs patient-id, the column that tells patients apart'
            )
        return self


class AllowedModel(TomlSection):
    """A base model that this site will train, held in a folder of its own."""

    name: str
    path: str
    digest: PublicKeyHex


class PolicySection(TomlSection):
    """What this site will do at all. The coordinator can only ask for less."""

    # Lifetime epsilon of the data set, over all runs and coordinators. A low one protects more and ends
    # sooner: nothing gives it back. `inf` is no cap.
    max_epsilon: float = Field(gt=0)
    # The chance that a run's guarantee fails; below 1 / patients, or it covers for publishing one of them.
    max_delta: float = Field(1e-5, gt=0, lt=1)
    # Refuse every task without differential privacy.
    require_dp: bool = True
    # The only models that are trained, by name and digest. An empty list trains none.
    allowed_models: tuple[AllowedModel, ...]
    # Also told to the coordinator, which then asks for no more. Higher fits better, and costs memory
    # and upload.
    max_rank: int = Field(64, ge=1)
    # Layers that may be adapted, by the name in lora.target-modules; "all-linear" allows any. Fewer
    # layers hold less of what the records say.
    allowed_target_modules: tuple[str, ...] = ("all-linear",)
    # Optimizer steps of one task. More hold the machine longer; under a given epsilon also more noise.
    max_steps: int = Field(10_000, ge=1)
    # Clipping norm. Noise grows with it, so epsilon does not depend on it; a huge one ruins a model.
    max_grad_norm: float = Field(100.0, gt=0)
    # Tokens of one task: steps x expected batch (x records of a patient) x tokens per record. It bounds
    # what the steps alone do not: few steps of huge batches.
    max_tokens: int = Field(10**9, ge=1)
    # Hours of training of one task; it stops there and nothing leaves, though its epsilon stays charged.
    max_hours: float = Field(24.0, gt=0)
    # ask: every run waits until `consilium client approve RUN`; auto: what this policy allows may run,
    # which spares people and leaves the decision to the lines above.
    approval: Literal["auto", "ask"] = "auto"
    # Numbers that may leave beside the adapter. "train-loss" is outside epsilon: it speaks of the
    # records themselves. So does "evaluation": sums of losses and counts over the test records, once a run.
    release_metrics: tuple[Literal["train-loss", "train-seconds", "evaluation"], ...] = ()
    # Fewer test records, or patients where unit = "patient", are not counted for anybody: the sum of a few is
    # nearly one's own.
    min_evaluation_records: int = Field(50, ge=1)
    # Runs that may have an evaluation, over all coordinators, for good. Each is one more question about the
    # same records, and a run that trains next to nothing costs next to no epsilon.
    max_evaluations: int = Field(20, ge=0)
    # Significant digits of every number of `release-metrics` that leaves: fewer say less of a record.
    metric_digits: int = Field(3, ge=1, le=17)
    # Euclidean norm of all tensors of an outgoing adapter together. A trained one is far below it; one
    # that is not has diverged.
    max_adapter_norm: float = Field(10_000.0, gt=0)

    @model_validator(mode="after")
    def _one_model_has_one_name(self) -> PolicySection:
        names = [model.name for model in self.allowed_models]
        if len(set(names)) != len(names):
            raise ValueError("two of allowed-models have the same name; give each its own")
        return self


class KeysSection(TomlSection):
    """This site's own keys, relative to this folder."""

    signing: str = "keys/signing.pem"
    # Shows Flower which node connects: ECDSA P-384 in OpenSSH form. The coordinator enrols its .pub.
    node: str = "keys/node"


class CoordinatorSection(TomlSection):
    """Whose tasks this site believes, and where `consilium client up` finds the coordinator."""

    # One Ed25519 public key of 64 hex digits, or a list of them.
    public_key: PublicKeyHex | tuple[PublicKeyHex, ...]
    # HOST:PORT of the coordinator; the only connection that this site opens.
    address: HostPort | None = None
    # What vouches for that host, relative to this folder.
    root_certificates: str = "coordinator/ca.crt"

    @model_validator(mode="after")
    def _somebody_is_believed(self) -> CoordinatorSection:
        if not self.public_keys:
            raise ValueError(
                "public-key is an empty list; give the key of at least one coordinator, or let "
                "`consilium client join BUNDLE` write it"
            )
        return self

    @property
    def public_keys(self) -> tuple[str, ...]:
        """Every key that may sign a task."""
        return (self.public_key,) if isinstance(self.public_key, str) else self.public_key


class DeviceSection(TomlSection):
    """Where training runs: "auto", "cpu", "cuda", "cuda:1"..."""

    name: str = "auto"


class AgentSection(TomlSection):
    """The process that holds data, model and keys between tasks."""

    # Where the relay reaches it; relative to this folder. Elsewhere, such as /run/consilium/agent.sock, where
    # the relay runs as another user, who cannot look into this folder.
    socket: str = "state/agent.sock"
    # After so long without a task the base model leaves the memory. Longer saves loading it again; shorter
    # gives the GPU back sooner.
    idle_unload_s: float = Field(1800.0, gt=0)


class SiteConfig(TomlSection):
    """The whole of site.toml, and the folder it lies in."""

    site: SiteSection
    data: DataSection
    policy: PolicySection
    coordinator: CoordinatorSection
    keys: KeysSection = Field(default_factory=KeysSection)
    device: DeviceSection = Field(default_factory=DeviceSection)
    agent: AgentSection = Field(default_factory=AgentSection)
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
    def node_key_path(self) -> Path:
        """Where the private key of this site's SuperNode is."""
        return self.folder / self.keys.node

    @property
    def root_certificates_path(self) -> Path:
        """Where the certificate that vouches for the coordinator is."""
        return self.folder / self.coordinator.root_certificates

    @property
    def socket_path(self) -> Path:
        """Where the relay reaches the agent."""
        return self.folder / self.agent.socket

    @property
    def control_socket_path(self) -> Path:
        """Where the hospital's own people reach the agent; the relay cannot."""
        return self.folder / "state" / "agent-control.sock"

    @property
    def models(self) -> dict[str, Path]:
        """Allowed model names -> folders."""
        return {model.name: self.folder / model.path for model in self.policy.allowed_models}


def load_site_config(folder: Path) -> SiteConfig:
    """Return the site.toml of a site folder. Raises ConfigError naming every bad key at once."""
    path = folder / SITE_FILE
    if not path.is_file():
        raise ConfigError(
            f"no {SITE_FILE} in {folder.resolve()}; give the hospital's folder, on the command line with "
            "--site"
        )
    try:
        config = SiteConfig.model_validate(read_toml(path))
    except ValidationError as error:
        raise ConfigError(f"{path} is not usable:\n{bad_keys(error)}") from None
    if math.isnan(config.policy.max_epsilon):
        raise ConfigError(f"{path}: policy.max-epsilon is not a number")
    return config.model_copy(update={"folder": folder.resolve()})
