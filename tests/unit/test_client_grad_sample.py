"""Per-record gradients against autograd, one record at a time, and against Opacus's hooks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from torch import nn

from client.grad_sample import record_gradients
from common.config import LoraSection, ModelSection, TrainedFactors
from common.errors import PrivacyError, TrainingError
from common.lora import attached, initial_adapter, write_adapter
from common.metrics import record_losses
from common.model import BaseModel, load_base, release_base
from common.prompts import Example, collate
from tests.unit.test_client_dp import frozen_beside, lively_adapter
from tests.unit.tiny import CONFIGS, make_examples, tiny_base

CPU = torch.device("cpu")
LORA = LoraSection(rank=4, alpha=8.0)


@pytest.fixture
def model() -> Iterator[nn.Module]:
    base = tiny_base("llama")
    start = lively_adapter(base)
    with attached(base, LORA) as lent:
        write_adapter(lent, start)
        yield lent


def _losses(model: nn.Module, examples: list[Example]) -> torch.Tensor:
    batch = collate(examples, pad_id=0, device=CPU)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return record_losses(logits, batch.labels)


def _rows(model: nn.Module, examples: list[Example]) -> torch.Tensor:
    with record_gradients(model) as gradients:
        gradients.begin(len(examples))
        torch.autograd.backward(_losses(model, examples).sum())
        return gradients.take()


def _naive_rows(model: nn.Module, examples: list[Example]) -> torch.Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for example in examples:
        gradients = torch.autograd.grad(_losses(model, [example]).sum(), parameters)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def _opacus_rows(model: nn.Module, examples: list[Example]) -> torch.Tensor:
    hooked = GradSampleModule(model, batch_first=True, loss_reduction="sum", strict=False)
    try:
        torch.autograd.backward(_losses(hooked, examples).sum())
        rows = [p.grad_sample.flatten(1) for p in model.parameters() if p.requires_grad]
        return torch.cat(rows, dim=1)
    finally:
        hooked.remove_hooks()
        model.zero_grad()
        for parameter in model.parameters():
            vars(parameter).pop("grad_sample", None)


@pytest.mark.parametrize("frozen_rank", [0, 6])
@pytest.mark.parametrize("factors", ["both", "a", "b"])
def test_a_records_gradient_does_not_change_with_its_neighbour(
    factors: TrainedFactors, frozen_rank: int
) -> None:
    record, short, long = make_examples(3, lengths=(12, 5, 30))
    base = tiny_base("llama")
    start = lively_adapter(base)
    frozen = frozen_beside(start, rank=frozen_rank) if frozen_rank else None
    with attached(base, LORA, trained_factors=factors, frozen=frozen) as model:
        write_adapter(model, start)
        with_short = _rows(model, [record, short])[0]
        with_long = _rows(model, [record, long])[0]

    assert float(with_short.norm()) > 0.01
    torch.testing.assert_close(with_short, with_long, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_rows_of_every_family_are_the_gradients_of_one_record_at_a_time(
    family: str, checkpointing: bool
) -> None:
    base = tiny_base(family)
    start = lively_adapter(base)
    examples = make_examples(3, lengths=(6, 14, 9))
    with attached(base, LORA) as model:
        write_adapter(model, start)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                # GPT-2's own, which would differ from pass to pass.
                module.p = 0.0
        expected = _naive_rows(model, examples)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": True})  # type: ignore[operator]
        rows = _rows(model, examples)
        if checkpointing:
            model.activation_checkpointing_disable()  # type: ignore[operator]
        model.eval()

    assert float(expected.norm()) > 0.1
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("factors", ["both", "a", "b"])
@pytest.mark.parametrize(("dropout", "frozen_rank"), [(0.0, 0), (0.5, 0), (0.5, 6)])
def test_rows_on_a_quantised_base_are_those_of_opacuss_hooks(
    tiny_model_dir: Path, dropout: float, frozen_rank: int, factors: TrainedFactors
) -> None:
    base = load_base(tiny_model_dir, ModelSection(quantization="nf4"), device=CPU)
    lora = LORA.model_copy(update={"dropout": dropout})
    examples = make_examples(4, lengths=(6, 14, 9))
    start = lively_adapter(base)
    frozen = frozen_beside(start, rank=frozen_rank) if frozen_rank else None
    with attached(base, lora, trained_factors=factors, frozen=frozen) as model:
        write_adapter(model, start)
        model.train()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            expected = _opacus_rows(model, examples)
            # The same masks once more.
            torch.manual_seed(3)
            rows = _rows(model, examples)
        model.eval()
    release_base()

    assert float(expected.norm()) > 0.1
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-6)


class _Layers(nn.Module):
    """Two factors by the names that LoRA gives them; the second is used as often as asked."""

    def __init__(self, uses: int) -> None:
        super().__init__()
        self.a = nn.Module()
        self.a.lora_A = nn.ModuleDict({"default": nn.Linear(3, 3, bias=False)})
        self.a.lora_B = nn.ModuleDict({"default": nn.Linear(3, 3, bias=False)})
        self.uses = uses

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        values = self.a.lora_A["default"](inputs)  # type: ignore[index,operator]
        for _ in range(self.uses):
            values = self.a.lora_B["default"](values)  # type: ignore[index,operator]
        return values


@pytest.fixture
def unset_memory_shows() -> Iterator[None]:
    """Memory that nobody wrote holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("unset_memory_shows")
@pytest.mark.parametrize("uses", [0, 1, 3])
def test_a_weight_counts_as_often_as_it_is_used(uses: int) -> None:
    torch.manual_seed(0)
    model, inputs = _Layers(uses), torch.randn(2, 4, 3)
    with record_gradients(model) as gradients:
        for _ in range(2):
            # What an earlier pass left does not show.
            gradients.begin(2)
            torch.autograd.backward(model(inputs).square().sum())
            rows = gradients.take()
    for row, record in zip(rows, inputs, strict=True):
        expected = torch.autograd.grad(
            model(record[None]).square().sum(), list(model.parameters()), materialize_grads=True
        )
        torch.testing.assert_close(row, torch.cat([g.flatten() for g in expected]))


@pytest.mark.parametrize("shape", [(8, 3), (8, 1, 3), (2, 3)])
def test_a_layer_that_does_not_see_records_is_refused(shape: tuple[int, ...]) -> None:
    model = _Layers(1)
    with record_gradients(model) as gradients:
        gradients.begin(2)
        loss = model(torch.ones(shape)).sum()
        with pytest.raises(PrivacyError, match=r"of shape \(.*batch of 2 records.*mixes records"):
            loss.backward()


def test_the_backward_pass_leaves_no_summed_gradient(model: nn.Module) -> None:
    with record_gradients(model) as gradients:
        gradients.begin(1)
        torch.autograd.backward(_losses(model, make_examples(1, lengths=(6,))).sum())
        assert all(p.grad is None for p in gradients.parameters)


def test_the_model_is_as_before_even_after_an_error(model: nn.Module) -> None:
    examples = make_examples(2, lengths=(6, 9))
    before = _losses(model, examples)

    def fail() -> None:
        with record_gradients(model) as gradients:
            gradients.assign(torch.zeros(gradients.width))
            raise TrainingError("stopped")

    with pytest.raises(TrainingError, match="stopped"):
        fail()

    assert not any("forward" in vars(module) for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(_losses(model, examples), before)
    torch.autograd.backward(_losses(model, examples).sum())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_trainable_parameter_without_record_gradients_is_refused() -> None:
    base: BaseModel = tiny_base("llama")
    initial_adapter(base, LORA, seed=0)
    with attached(base, LORA) as model:
        next(p for n, p in model.named_parameters() if "embed" in n).requires_grad_(True)
        with (
            pytest.raises(PrivacyError, match="no per-record gradient"),
            record_gradients(model),
        ):
            pass


def test_a_bias_beside_a_factor_is_refused() -> None:
    model = _Layers(1)
    model.a.lora_B["default"].bias = nn.Parameter(torch.zeros(3))  # type: ignore[index]
    with (
        pytest.raises(PrivacyError, match=r"lora_B\.default\.bias is trainable"),
        record_gradients(model),
    ):
        pass
