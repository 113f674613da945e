"""NF4 LoRA under DP on CUDA; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from client.trainer import DpSettings, train
from common.config import LoraSection, ModelSection, TrainSection
from common.lora import attached, initial_adapter, read_adapter, write_adapter
from common.model import choose_device, load_base, release_base
from common.prompts import Examples
from tests.unit.tiny import make_examples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LORA = LoraSection(rank=4)


@pytest.mark.parametrize("optimizer", ["adamw", "paged-adamw-8bit"])
@pytest.mark.parametrize(
    "dp",
    [None, DpSettings(1.0, 1.0, 0.5), DpSettings(1.0, 1.0, 0.5, max_records_per_patient=3)],
)
def test_nf4_training_on_cuda_moves_a_finite_adapter(
    tiny_model_dir: Path, optimizer: str, dp: DpSettings | None
) -> None:
    base = load_base(tiny_model_dir, ModelSection(quantization="nf4"), device=choose_device("cuda"))
    by_patient = dp is not None and dp.max_records_per_patient > 0
    start = initial_adapter(base, LORA, seed=0)
    with attached(base, LORA) as model:
        write_adapter(model, start)
        train(
            model,
            Examples(make_examples(8, lengths=(10, 20))),
            settings=TrainSection.model_validate(
                {"rounds": 1, "local-steps": 3, "batch-size": 4, "optimizer": optimizer}
            ),
            server_round=1,
            stream="north",
            pad_id=base.pad_id,
            device=base.device,
            dp=dp,
            patients=[[0, 1, 2], [3], [4, 5, 6, 7]] if by_patient else None,
        )
        trained = read_adapter(model, LORA, rank=4)
    release_base()

    assert trained.is_finite()
    assert trained.digest() != start.digest()
