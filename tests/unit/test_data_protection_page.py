"""The page for the data protection officer says what the software does: commands, keys, what leaves."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import typer.main

import client.cli
import server.cli
from client.egress import EVALUATION_NUMBERS, OPTIONAL_NUMBERS, PUBLIC_NUMBERS
from client.site_config import DataSection, PolicySection
from common.records import Reply

PAGE = (Path(__file__).parents[2] / "deploy" / "data-protection.md").read_text(encoding="utf-8")
# As a reader sees it, whatever the line breaks.
TEXT = " ".join(PAGE.split())

# What of a reply is the hospital's own, and the words for it on the page; the rest of a reply only
# says which task it answers.
SAID = {
    "adapter_digest": "the adapter's numbers",
    "numbers": "training loss, training time",
    "privacy": "what the round cost in privacy",
    "error_code": "a code such as `policy`",
    "correlation_id": "a random number to find it in your log",
    "heads": "the state of your privacy ledger and audit log",
}
ECHOED = {"site", "run_uid", "server_round", "attempt", "task_sha256", "protocol"}
NUMBERS = {
    "declared-size": "the declared size you chose",
    "max-rank": "the highest adapter rank you allow",
    "steps": "steps done",
    "train-loss": "training loss",
    "train-seconds": "training time",
    "evaluation-records": "how many test records",
    "evaluation-tokens": "answer tokens",
    "evaluation-nll": "the sum of losses",
    "evaluation-correct": "the count of right tokens",
    "evaluation-base-nll": "for the base model and the new one the sum of losses",
    "evaluation-base-correct": "the count of right tokens",
}


def test_everything_that_a_reply_holds_is_on_the_page() -> None:
    assert {field.name for field in fields(Reply)} == set(SAID) | ECHOED
    assert set(NUMBERS) == PUBLIC_NUMBERS | OPTIONAL_NUMBERS | EVALUATION_NUMBERS
    for words in (*SAID.values(), *NUMBERS.values()):
        assert words in TEXT


def _commands() -> list[tuple[str, str, list[str]]]:
    """(group, command, its options) of everything on the page that looks like a command."""
    found = []
    for code in re.findall(r"`([^`]+)`", TEXT):
        match = re.fullmatch(r"consilium (\w+) ([\w-]+)(.*)", code)
        if match:
            found.append((match[1], match[2], re.findall(r"--[\w-]+", match[3])))
    return found


def test_every_command_on_the_page_exists_with_its_options() -> None:
    groups = {"client": client.cli.app, "server": server.cli.app}
    commands = _commands()

    assert {name for _, name, _ in commands} == {
        "dry-run",
        "approve",
        "ledger",
        "log",
        "receipt",
        "withdraw",
    }
    for group, name, options in commands:
        command = typer.main.get_command(groups[group]).commands[name]  # type: ignore[attr-defined]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(options) <= known, name


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("approve", {"--decline"}),
        ("log", {"--what", "--verify", "--anchor"}),
        ("ledger", {"--settle"}),
    ],
)
def test_options_named_apart_from_their_command_exist(command: str, options: set[str]) -> None:
    group = typer.main.get_command(client.cli.app)
    known = group.commands[command].params  # type: ignore[attr-defined]

    assert options <= {option for parameter in known for option in parameter.opts}
    assert all(option in TEXT for option in options)


def test_every_line_of_site_toml_that_the_page_names_exists() -> None:
    known = {
        (field.alias or name)
        for section in (DataSection, PolicySection)
        for name, field in section.model_fields.items()
    }
    named = {
        match[1]
        for code in re.findall(r"`([^`]+)`", TEXT)
        if (match := re.fullmatch(r"([a-z]+(?:-[a-z]+)*)(?: = .*)?", code))
    }
    codes = {"policy", "data"}

    assert {"max-epsilon", "require-dp", "release-metrics", "approval", "unit", "scrub"} <= named
    assert named - codes <= known


def test_the_odds_on_the_page_are_those_of_epsilon() -> None:
    """Even odds before, e^epsilon to 1 after: a chance of e^epsilon / (1 + e^epsilon)."""
    said = re.findall(r"(?:epsilon|at) (\d+) (?:that|it) is (\d+) %", TEXT)

    assert said == [("1", "73"), ("3", "95")]
    for epsilon, percent in said:
        odds = math.exp(int(epsilon))
        assert round(100 * odds / (1 + odds)) == int(percent)


def test_the_page_is_two_pages() -> None:
    assert len(TEXT.split()) <= 1200
