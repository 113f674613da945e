"""What can be wrong with a run, looked for before anything is written, and said all at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.config import RoundSection, RunConfig
from common.errors import ConfigError, ConsiliumError
from common.model_folder import digest_model, resolve_model
from common.privacy import calibrate_noise, public_sample_rate
from server.evaluation import central_files
from server.prepared_run import PreparedRun, prepare_run
from server.tracking import require_trackers

# Keys that name a file or a folder which is read or written while the run goes.
_PLACES = ("evaluation.questions", "tracking.tensorboard", "tracking.mlflow")


@dataclass(frozen=True, slots=True)
class BaseModelFolder:
    """The base model of a run: its plain name, where it is here, and what it is by digest."""

    name: str
    path: Path
    digest: str


@dataclass(frozen=True, slots=True)
class CheckedRun:
    """What a check found: model.name in config is a plain name now, the rest is loaded."""

    config: RunConfig
    model: BaseModelFolder
    central_files: tuple[Path, ...]
    prepared: PreparedRun


class Problems:
    """Collects what is wrong, so that a person hears of all of it at once."""

    def __init__(self) -> None:
        self._found: list[ConsiliumError] = []

    def add(self, error: ConsiliumError) -> None:
        """Take note of something that is wrong."""
        self._found.append(error)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Take note of a ConsiliumError and go on."""
        try:
            yield
        except ConsiliumError as error:
            self._found.append(error)

    def raise_all(self) -> None:
        """Raise the one thing that is wrong, or a ConfigError naming all of them."""
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            listed = "\n".join(f"  {problem}" for problem in self._found)
            raise ConfigError(f"{len(self._found)} things are wrong:\n{listed}")


def check_run(
    config: RunConfig, *, base_dir: Path, problems: Problems, known: Mapping[str, Path]
) -> CheckedRun | None:
    """Load everything that the coordinator needs for a run; None when `problems` says what is wrong.

    base_dir: what relative paths in the config are relative to. known: model names -> folders.
    """
    if config.round != RoundSection():
        problems.add(
            ConfigError(
                "round.trained-factors and round.frozen-rank are said anew in each round, by "
                "aggregation.method; take them out of RUN.toml"
            )
        )
    with problems.noting():
        require_trackers(config)
    config = _with_places(config, base_dir=base_dir)
    files: list[Path] = []
    with problems.noting():
        found = central_files(config.evaluation.central_data, relative_to=base_dir)
        files = [path.resolve() for path in found]
    with problems.noting():
        plain, model = resolve_base(config, base_dir=base_dir, known=known)
        prepared = prepare_run(plain, models={model.name: model.path}, central_files=files)
        return CheckedRun(plain, model, tuple(files), prepared)
    return None


def _with_places(config: RunConfig, *, base_dir: Path) -> RunConfig:
    """Make paths of the coordinator's own absolute: a ServerApp's working folder is Flower's."""
    named = {key: str(config.flat()[key]) for key in _PLACES}
    return config.replace({k: str((base_dir / v).resolve()) for k, v in named.items() if v})


def check_noise(config: RunConfig, *, smallest_size: int) -> None:
    """Raise PrivacyError when no noise meets the run's target.

    smallest_size: of the sites; it has the highest sampling rate and needs the most noise.
    """
    if config.use_dp and config.privacy.noise_multiplier == "auto":
        calibrate_noise(
            target_epsilon=config.privacy.target_epsilon,
            delta=config.privacy.target_delta,
            sample_rate=public_sample_rate(
                batch_size=config.train.batch_size, declared_size=smallest_size
            ),
            steps=config.total_steps,
            accountant=config.privacy.accountant,
        )


def resolve_base(
    config: RunConfig, *, base_dir: Path, known: Mapping[str, Path]
) -> tuple[RunConfig, BaseModelFolder]:
    """Return the config with model.name as a plain name, and the folder that it stands for.

    A path is relative to base_dir. known: further names -> folders.
    Raises ModelError when it is not a usable model folder.
    """
    name = config.model.name
    folder = base_dir / name
    if folder.is_dir():
        path = resolve_model(config.model, known={name: folder}, hub=True)
        config = config.replace({"model.name": path.name})
    else:
        path = resolve_model(config.model, known=known, hub=True)
    return config, BaseModelFolder(config.model.name, path, digest_model(path))
