"""An export of a finished run: written, loaded back by plain transformers and PEFT, and measured.

It is done only when what was loaded back has the loss of the adapter on the base in that same precision.
Memory: one model in the precision of the export at a time, beside it one layer while merging and one shard
of at most 2 GB while writing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from common.config import ModelSection
from common.errors import ModelError
from common.lora import carrying
from common.model import BaseModel, choose_device, load_base, release_base
from common.prompts import Examples, resolve_template, tokenize_all
from server.evaluation import evaluate, evaluate_model, load_central_examples
from server.export.adapter import export_adapter
from server.export.folder import write_marker
from server.export.probe_texts import PROBES
from server.finished_run import FinishedRun

ExportFormat = Literal["adapter", "merged"]
ExportDtype = Literal["float32", "bfloat16", "float16"]

# In nats per token. float32: only the order of sums differs. Below it every merged weight is rounded once
# more, by up to 2^-9 (bfloat16, 8 significant bits) or 2^-12 (float16, 11) of itself, which the adapter
# beside its base is not. No arithmetic says what that does to a loss: on four small models it moved by at
# most 2e-2 and 2e-3, and by more only where the adapter had ruined the model.
TOLERANCES: dict[ExportDtype, float] = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 5e-2}
STEPS = 6
_SHARD = "2GB"
OnStep = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What to export. base: the base model's folder. central_files: records to measure on, () for none."""

    run: FinishedRun
    base: Path
    format: ExportFormat
    dtype: ExportDtype = "float32"
    central_files: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was measured: losses in nats per answer token, on `records` records or fixed texts.

    loss: of what plain transformers loaded back. adapter_loss: of the adapter on the base in that precision.
    run_loss: of the adapter on the base as the run had it, quantised.
    """

    format: ExportFormat
    dtype: ExportDtype
    measured_on: Literal["central records", "fixed texts"]
    records: int
    loss: float
    adapter_loss: float
    run_loss: float
    quantization: str
    tolerance: float

    @property
    def difference(self) -> float:
        """How far what was loaded back is from the adapter on the base."""
        return abs(self.loss - self.adapter_loss)

    @property
    def run_distance(self) -> float:
        """How far it is from the model that the run trained on, with its sign."""
        return self.loss - self.run_loss


def write_export(request: ExportRequest, folder: Path, *, on_step: OnStep) -> ExportReport:
    """Write an export into an empty folder, load it back and measure it.

    on_step: is told what is done next, STEPS times. Raises ModelError when what was loaded back is not the
    same model, SignatureError when the base is another.
    """
    run, section = request.run, request.run.config.model
    batch_size = run.config.evaluation.batch_size
    on_step(f"measuring on the base in {section.quantization}, as the run had it")
    base = load_base(request.base, section, device=choose_device(), expected_digest=run.base_digest)
    examples = _examples(request, base)
    lora = run.config.lora
    run_loss = evaluate(base, examples, adapter=run.adapter, lora=lora, batch_size=batch_size).loss
    del base
    release_base()

    on_step(f"loading the base in {request.dtype}")
    base = load_base(
        request.base,
        ModelSection(name=section.name, quantization="none", compute_dtype=request.dtype),
        device=choose_device(),
        expected_digest=run.base_digest,
    )
    try:
        on_step(f"measuring the adapter on the base in {request.dtype}")
        with carrying(base, lora, run.adapter) as model:
            adapter_loss = evaluate_model(model, base, examples, batch_size=batch_size).loss
            if not math.isfinite(adapter_loss):
                raise ModelError(
                    f"in {request.dtype} this model's loss is not finite; export it with --dtype float32 "
                    "or bfloat16"
                )
            on_step("merging and writing" if request.format == "merged" else "writing")
            if request.format == "merged":
                merged: Any = model
                merged.merge_adapter(safe_merge=True)
        _write(request, base, folder)
    finally:
        # Merged weights must not pass for the base in whatever this process does next.
        del base
        release_base()

    on_step("loading it back")
    loaded = load_back(request.format, folder, base=request.base, dtype=request.dtype)
    if request.format == "merged" and not _same(_examples(request, loaded), examples):
        raise ModelError(f"the tokenizer in {folder.name} cuts text otherwise than the base's")
    on_step("measuring what was loaded back")
    report = ExportReport(
        format=request.format,
        dtype=request.dtype,
        measured_on="central records" if request.central_files else "fixed texts",
        records=len(examples),
        loss=evaluate_model(loaded.model, loaded, examples, batch_size=batch_size).loss,
        adapter_loss=adapter_loss,
        run_loss=run_loss,
        quantization=section.quantization,
        tolerance=TOLERANCES[request.dtype],
    )
    if not report.difference <= report.tolerance:
        raise ModelError(
            f"the {request.format} export has loss {report.loss:.6f} when loaded back, and the adapter on "
            f"the base {report.adapter_loss:.6f}; they may differ by {report.tolerance:g}: nothing was "
            f"exported{'' if request.dtype == 'float32' else '; try --dtype float32'}"
        )
    write_marker(folder, _record(request, report), later=frozenset())
    return report


def load_back(form: ExportFormat, folder: Path, *, base: Path, dtype: ExportDtype) -> BaseModel:
    """Return an export as plain transformers, or transformers and PEFT, load it; nothing of ours is in it.

    Raises ModelError when they do not.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = folder if form == "merged" else base
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype), use_safetensors=True
        )
        if form == "adapter":
            with warnings.catch_warnings():
                # What PEFT does for layers of type Conv1D, it says.
                warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
                model = PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"the {form} export could not be loaded back: {error}") from None
    device = choose_device()
    return BaseModel(model.to(device), tokenizer, "", device)


def _write(request: ExportRequest, base: BaseModel, folder: Path) -> None:
    run = request.run
    if request.format == "adapter":
        export_adapter(run.adapter, folder, lora=run.config.lora, base_name=run.base_name)
        return
    from transformers import AutoConfig

    model: Any = base.model
    # Off while training; a served model would be slow without.
    model.config.use_cache = getattr(AutoConfig.from_pretrained(request.base), "use_cache", True)
    # It names code beside the base or on a hub, which nothing here has run or looked at.
    vars(model.config).pop("auto_map", None)
    model.save_pretrained(folder, max_shard_size=_SHARD)
    base.tokenizer.save_pretrained(folder)


def _examples(request: ExportRequest, base: BaseModel) -> Examples:
    config = request.run.config
    examples = load_central_examples(request.central_files, config, base=base)
    if examples is not None:
        return examples
    return tokenize_all(
        PROBES,
        tokenizer=base.tokenizer,
        template=resolve_template(config.data.prompt_template),
        max_length=config.data.max_length,
    )


def _same(some: Examples, others: Examples) -> bool:
    return len(some) == len(others) and all(
        one == other for one, other in zip(some, others, strict=True)
    )


def _record(request: ExportRequest, report: ExportReport) -> dict[str, Any]:
    run = request.run
    return {
        "made_by": f"consilium {version('consilium')}",
        "run": run.folder.run_uid,
        "round": run.exported_round,
        "base_name": run.base_name,
        "base": run.base_digest,
        "adapter": run.adapter_digest,
        "adapter_unscaled": run.adapter.digest(),
        **asdict(report),
        "difference": report.difference,
        "run_distance": report.run_distance,
    }
