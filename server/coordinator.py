"""The coordinator's folder, and coordinator.toml in it.

DIR/ coordinator.toml   address that hospitals reach
     tls/               ca.crt  server.crt  server.key
     superexec.secret   signing.pem  roster.json  revoked.json  audit.jsonl
     launches/          UID.json and UID.toml of each run that was asked for
     flower/            FLWR_HOME: state.db, logs
     up.lock  up.json   of `consilium server up`; watch.json where it serves reports
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from common.address import Address, HostPort, parse_address
from common.config import read_toml
from common.errors import ConfigError
from common.flower_process import flower_environment
from common.locks import lock_holder
from common.toml_section import TomlSection, bad_keys
from server.audit import AUDIT_FILE, KEY_FILE
from server.flower_control import FlowerControl
from server.roster import Roster

COORDINATOR_FILE = "coordinator.toml"
_CONNECTION = "coordinator"


class ServerSection(TomlSection):
    """Where the SuperLink is. tls/server.crt must be good for every host named here."""

    # What hospitals connect to, from outside.
    address: HostPort
    # What the SuperLink listens on; "" is the same. "0.0.0.0" listens on every interface.
    bind_host: str = ""
    # 0 is the same as in `address`; another one where something in front forwards it.
    bind_port: int = Field(0, ge=0, lt=65536)
    # How this machine's own processes reach the SuperLink; "" is the same as `address`.
    local_address: HostPort | None = None


class CoordinatorConfig(TomlSection):
    """The whole of coordinator.toml."""

    server: ServerSection


@dataclass(frozen=True, slots=True)
class Coordinator:
    """A coordinator's folder (absolute) and its settings."""

    folder: Path
    config: CoordinatorConfig

    @property
    def bind(self) -> Address:
        """What the SuperLink listens on."""
        server = self.config.server
        address = parse_address(server.address)
        return Address(server.bind_host or address.host, server.bind_port or address.port)

    @property
    def local_address(self) -> str:
        """How this machine's own processes reach the SuperLink."""
        return self.config.server.local_address or self.config.server.address

    @property
    def ca(self) -> Path:
        """The certificate that vouches for the SuperLink's."""
        return self.folder / "tls" / "ca.crt"

    @property
    def certificate(self) -> Path:
        """The SuperLink's certificate."""
        return self.folder / "tls" / "server.crt"

    @property
    def certificate_key(self) -> Path:
        """The key of the SuperLink's certificate."""
        return self.folder / "tls" / "server.key"

    @property
    def superexec_secret(self) -> Path:
        """What the coordinator's own superexec shows to the SuperLink."""
        return self.folder / "superexec.secret"

    @property
    def signing_key(self) -> Path:
        """The key that signs tasks."""
        return self.folder / KEY_FILE

    @property
    def roster_file(self) -> Path:
        """Who is enrolled."""
        return self.folder / "roster.json"

    @property
    def revocations_file(self) -> Path:
        """Whose keys hold no more."""
        return self.folder / "revoked.json"

    @property
    def superlink_database(self) -> Path:
        """What the SuperLink remembers, Flower's own."""
        return self.flower_home / "state.db"

    @property
    def audit_log(self) -> Path:
        """What was asked and answered."""
        return self.folder / AUDIT_FILE

    @property
    def launches(self) -> Path:
        """The runs that were asked for."""
        return self.folder / "launches"

    @property
    def flower_home(self) -> Path:
        """FLWR_HOME."""
        return self.folder / "flower"

    @property
    def up_lock(self) -> Path:
        """Held by `consilium server up`."""
        return self.folder / "up.lock"

    @property
    def up_state(self) -> Path:
        """What `consilium server up` says of its processes."""
        return self.folder / "up.json"

    @property
    def watch_state(self) -> Path:
        """Where `consilium server up` serves reports, while it does."""
        return self.folder / "watch.json"

    @property
    def keeper_state(self) -> Path:
        """What the keeper remembers of what it submitted."""
        return self.folder / "keeper.json"

    def up_pid(self) -> int | None:
        """The process of `consilium server up`, None when it does not run."""
        return lock_holder(self.up_lock)

    def roster(self) -> Roster:
        """Who is enrolled. Raises ConfigError."""
        return Roster.load(self.roster_file)

    def environment(self) -> dict[str, str]:
        """Return what all of Flower's processes here are given."""
        return flower_environment(self.flower_home)

    def control(
        self, *, timeout_s: float = 60.0, mark: dict[str, str] | None = None
    ) -> FlowerControl:
        """Return the line to the SuperLink. mark: of the guard that is to end what it starts."""
        environment = {**self.environment(), **(mark or {})}
        return FlowerControl(self.flower_home, _CONNECTION, environment, timeout_s=timeout_s)


def load_coordinator(folder: Path) -> Coordinator:
    """Return a coordinator's folder. Raises ConfigError naming everything that is wrong with it."""
    path = folder / COORDINATOR_FILE
    if not path.is_file():
        raise ConfigError(
            f"no {COORDINATOR_FILE} in {folder.resolve()}; give the coordinator's folder, DIR"
        )
    try:
        config = CoordinatorConfig.model_validate(read_toml(path))
    except ValidationError as error:
        raise ConfigError(f"{path} is not usable:\n{bad_keys(error)}") from None
    coordinator = Coordinator(folder.resolve(), config)
    needed = (
        coordinator.ca,
        coordinator.certificate,
        coordinator.certificate_key,
        coordinator.superexec_secret,
        coordinator.signing_key,
    )
    missing = [str(path.relative_to(coordinator.folder)) for path in needed if not path.is_file()]
    if missing:
        raise ConfigError(
            f"{coordinator.folder} lacks {', '.join(missing)}; restore them from a backup, or make the "
            "folder anew"
        )
    return coordinator
