"""Export of a run's adapter as a PEFT folder that plain PeftModel.from_pretrained loads."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from common.adapter import AdapterState, LoraPair
from common.config import LoraSection
from common.files import fsync_folder, write_atomically
from common.model import peft_config


def export_adapter(state: AdapterState, folder: Path, *, lora: LoraSection, base_name: str) -> Path:
    """Write adapter_config.json and adapter_model.safetensors into `folder`, replacing it whole.

    Exported with alpha = rank and without rsLoRA, so that every reader scales by exactly 1; B carries
    the scaling. Raises OSError, leaving what was there, when the disk is full.
    """
    pairs = {
        name: LoraPair(pair.A, (pair.B * np.float32(state.scaling_of(name))).astype(np.float32))
        for name, pair in state.pairs.items()
    }
    config = peft_config(
        lora.model_copy(
            update={
                "alpha": float(state.rank),
                "alpha_pattern": "",
                "use_rslora": False,
                "dropout": 0.0,
            }
        ),
        rank=state.rank,
    )
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    # PEFT resolves "all-linear" against a model; the modules that were trained are named instead.
    config.target_modules = sorted({name.split(".")[-1] for name in pairs})
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".adapter-"))
    try:
        config.save_pretrained(str(temporary))
        exported = AdapterState(pairs, 1.0)
        write_atomically(temporary / "adapter_model.safetensors", exported.to_safetensors())
        os.chmod(temporary, 0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_folder(folder.parent)
    return folder
