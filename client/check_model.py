"""Are the base models here what site.toml names, and do they fit this machine's disk?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rich.filesize import decimal

from client.check_line import CheckLine, failed, passed, warned
from client.model_size import ModelSize, read_model_size
from client.outbox import KEPT_ROUNDS
from client.site_config import SITE_FILE, SiteConfig
from common.errors import ModelError
from common.model_folder import check_model_folder, digest_model

# What is sent, what came in, what is being written, and the replies that are kept.
_ADAPTERS = 3 + KEPT_ROUNDS
# Ledger, logs and Flower's own files, however small the adapters are.
_SPARE_BYTES = 200 * 1000**2


def check_models(config: SiteConfig) -> Iterator[CheckLine]:
    """Hold every allowed model's folder against its digest."""
    for model in config.policy.allowed_models:
        name, folder = f"model {model.name}", config.models[model.name]
        # An unreadable folder would look like an empty one.
        if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
            yield _unreadable(name, folder, folder)
            continue
        try:
            check_model_folder(folder)
            digest = digest_model(folder)
        except ModelError as error:
            yield failed(
                name,
                str(error),
                f"copy the coordinator's model folder to {folder}, or correct its path",
            )
            continue
        except OSError as error:
            yield _unreadable(name, Path(error.filename or folder), folder)
            continue
        if digest == model.digest:
            yield passed(name, f"digest {digest[:16]}... as in {SITE_FILE}")
        else:
            yield failed(
                name,
                f"the folder has digest {digest[:16]}..., allowed-models says {model.digest[:16]}...",
                f"consilium model digest {folder} --check LIST names the files that differ; copy them again",
            )


def check_disk(config: SiteConfig) -> Iterator[CheckLine]:
    """Compare the space in state/ with what adapters, and a second copy of the model, would take."""
    sizes = list(sizes_of(config).values())
    state = config.folder / "state"
    free = shutil.disk_usage(state if state.is_dir() else config.folder).free
    rank = config.policy.max_rank
    adapter = max((size.adapter_bytes(rank) for size in sizes), default=0)
    model = max((size.file_bytes for size in sizes), default=0)
    needed = _ADAPTERS * adapter + _SPARE_BYTES
    detail = (
        f"{decimal(free)} free; {_ADAPTERS} adapters of rank {rank} and spare: {decimal(needed)}, "
        f"a second copy of the model: {decimal(model)}"
    )
    if free < needed:
        yield failed("disk", detail, f"free at least {decimal(needed - free)} where {state} lies")
    elif free < needed + model:
        yield warned("disk", detail, "free the space of a second copy before the model is replaced")
    else:
        yield passed("disk", detail)


def sizes_of(config: SiteConfig) -> dict[str, ModelSize]:
    """Return the size of each allowed model that can be read, by name; `check_models` names the others."""
    sizes = {}
    for name, folder in config.models.items():
        with suppress(ModelError):
            sizes[name] = read_model_size(folder)
    return sizes


def _unreadable(name: str, path: Path, folder: Path) -> CheckLine:
    return failed(
        name, f"{path} cannot be read by this user", f"let the agent's user: chmod -R a+rX {folder}"
    )
