"""The pages about handing a model on: their code runs, and their commands are those that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer.main

import server.cli
from server.export.model import TOLERANCES
from simulations.embedded import embedded_model_dir
from tests.unit.finished import finished_config, write_finished_run
from tests.unit.test_server_cli_release import server as consilium_server

DEPLOY = Path(__file__).parents[2] / "deploy"
SERVING = (DEPLOY / "serving.md").read_text(encoding="utf-8")
RUNBOOK = (DEPLOY / "runbook-coordinator.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", SERVING, re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both exports of one run, named as on the page."""
    place = tmp_path_factory.mktemp("serving")
    run = write_finished_run(place / "run", embedded_model_dir(), finished_config()).path
    consilium_server("export", run, "--format", "merged", "--out", place / "release")
    consilium_server("export", run, "--format", "adapter", "--out", place / "adapter")
    (place / "base-model").symlink_to(embedded_model_dir())
    return place


def test_the_merged_export_answers_as_the_page_says(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prompt is that of training, to the token: else the model would be asked what it never saw."""
    from common.prompts import TEMPLATES, Prompt, tokenize

    monkeypatch.chdir(place)
    page: dict[str, object] = {}
    exec(CODE[0], page)
    assert page["PROMPT"] == TEMPLATES["instruction"]
    asked: list[torch.Tensor] = []
    model = page["model"]
    written = model.generate  # type: ignore[attr-defined]

    def spy(**inputs: object) -> torch.Tensor:
        asked.append(inputs["input_ids"])  # type: ignore[arg-type]
        out: torch.Tensor = written(**inputs)
        return out

    monkeypatch.setattr(model, "generate", spy)
    said = page["answer"]("Is it?", "Yes.", max_new_tokens=8)  # type: ignore[operator]
    trained = tokenize(
        Prompt("Is it?", "Yes.", "It is."),
        tokenizer=page["tokenizer"],
        template=TEMPLATES["instruction"],
        max_length=512,
    )
    prompt = trained.token_ids[: len(trained.token_ids) - trained.num_answer]
    assert asked[0].tolist() == [list(prompt)]
    assert isinstance(said, str)
    assert capsys.readouterr().out.endswith("\n")


def test_the_adapter_goes_onto_its_base_as_the_page_says(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(place)
    page: dict[str, object] = {}
    exec(CODE[1], page)
    tokens = torch.arange(3, 20).unsqueeze(0)
    merged = AutoModelForCausalLM.from_pretrained("release")
    with torch.inference_mode():
        found = page["model"](input_ids=tokens).logits  # type: ignore[operator]
        torch.testing.assert_close(found, merged(input_ids=tokens).logits, rtol=0, atol=1e-3)


def test_every_command_on_the_pages_is_one_that_there_is() -> None:
    group = typer.main.get_command(server.cli.app)
    releasing = RUNBOOK.split("## Releasing a model")[1].split("\n## ")[0]
    found = re.findall(r"consilium server [^`\n#]+", SERVING + releasing)
    assert len(found) >= 8
    for line in found:
        words = shlex.split(line.replace("'", ""))
        command = group.commands.get(words[2])  # type: ignore[attr-defined]
        assert command is not None, line
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_the_tolerances_on_the_page_are_those_that_hold() -> None:
    for name, tolerance in TOLERANCES.items():
        [shown] = re.findall(rf"^\| `{name}` \| ([0-9e.-]+)", SERVING, re.MULTILINE)
        assert float(shown) == tolerance
