"""Export of a run's adapter as a PEFT folder that plain PeftModel.from_pretrained loads."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from common.adapter import AdapterState
from common.config import LoraSection
from common.files import fsync_folder, write_atomically
from common.lora import unscaled_config


def export_adapter(state: AdapterState, folder: Path, *, lora: LoraSection, base_name: str) -> Path:
    """Write adapter_config.json and adapter_model.safetensors into `folder`, replacing it whole.

    Exported with alpha = rank and without rsLoRA, so that every reader scales by exactly 1; B carries
    the scaling. Raises OSError, leaving what was there, when the disk is full.
    """
    config = unscaled_config(lora, rank=state.rank)
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    # PEFT resolves "all-linear" against a model; the modules that were trained are named instead.
    config.target_modules = sorted({name.split(".")[-1] for name in state.pairs})
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".adapter-"))
    try:
        config.save_pretrained(str(temporary))
        exported = state.unscaled().to_safetensors()
        write_atomically(temporary / "adapter_model.safetensors", exported)
        os.chmod(temporary, 0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_folder(folder.parent)
    return folder
