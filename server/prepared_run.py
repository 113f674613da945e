"""What a run needs loaded, and all that can be wrong with it found before a file is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.adapter import AdapterShape
from common.config import RunConfig
from common.lora import adapter_shape
from common.model import BaseModel, choose_device, load_base
from common.model_folder import resolve_model
from common.prompts import Prompt, resolve_template
from server.evaluation import CentralSet, check_options, load_central_set, pick_questions


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """What a run needs loaded; making it checks all that can be wrong before a file is written.

    base: the quantised base model. shape: of the global adapter. central: the test records, None without
    any. questions: that base and result will answer.
    """

    base: BaseModel
    shape: AdapterShape
    central: CentralSet | None
    questions: tuple[Prompt, ...] = ()


def prepare_run(
    config: RunConfig, *, models: Mapping[str, Path], central_files: Sequence[Path] = ()
) -> PreparedRun:
    """Load and check the base model, the LoRA setting and the central test set.

    models: model.name -> folder. central_files: records for central evaluation, [] for none.
    Raises ModelError, ConfigError or DataError.
    """
    base = load_base(
        resolve_model(config.model, known=models, hub=True), config.model, device=choose_device()
    )
    shape = adapter_shape(base, config.lora)
    resolve_template(config.data.prompt_template)
    central = load_central_set(central_files, config, base=base)
    check_options(central, config)
    return PreparedRun(base, shape, central, pick_questions(central, config))
