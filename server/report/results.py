"""What a run's evaluation.json and attack.json say, where there are any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import DataError

EVALUATION_FILE = "evaluation.json"
ATTACK_FILE = "attack.json"


class _Part(BaseModel):
    """What later versions add is no reason to show nothing."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Language(_Part):
    """loss: nats per answer token; perplexity: exp(loss); token_accuracy: 0 to 1."""

    loss: float | None = None
    perplexity: float | None = None
    token_accuracy: float | None = None


class Generation(_Part):
    """Answers compared with the reference; all in 0 to 1."""

    exact_match: float | None = None
    token_f1: float | None = None
    rouge_l: float | None = None
    bleu: float | None = None
    records: int = 0


class Options(_Part):
    """Answers from a set of labels. confusion: rows are the true label, columns the predicted one."""

    labels: tuple[str, ...] = ()
    accuracy: float | None = None
    macro_f1: float | None = None
    confusion: tuple[tuple[int, ...], ...] = ()
    records: int = 0


class Group(Language):
    """The records of one group."""

    group: str
    records: int = 0


class ModelScores(_Part):
    """One model on the central test set."""

    language: Language = Language()
    generation: Generation | None = None
    options: Options | None = None
    groups: tuple[Group, ...] = ()


class EvaluatedModels(_Part):
    """The untouched base and what the run made of it."""

    base: ModelScores = ModelScores()
    final: ModelScores = ModelScores()


class Question(_Part):
    """One question of the fixed list, and what either model answers."""

    question: str
    reference: str | None = None
    base: str = ""
    final: str = ""


class SiteScores(_Part):
    """What one site, or all of them together, measured on its own records: sums and counts."""

    records: int = 0
    tokens: int = 0
    loss: float | None = None
    token_accuracy: float | None = None
    base_loss: float | None = None
    base_token_accuracy: float | None = None


class Federated(_Part):
    """Evaluation at the sites; outside epsilon."""

    sites: dict[str, SiteScores] = {}
    all: SiteScores | None = None
    outside_epsilon: bool = True


class Evaluation(_Part):
    """The whole of evaluation.json."""

    run: str = ""
    round: int | None = None
    records: int = 0
    other_records: bool = False
    models: EvaluatedModels = EvaluatedModels()
    group_column: str | None = None
    worst_group: str | None = None
    questions: tuple[Question, ...] = ()
    federated: Federated | None = None


class Ledger(_Part):
    """What the accountant says of the audited pipeline; epsilon is None without protection."""

    unit: str = "record"
    epsilon: float | None = None
    delta: float | None = None
    noise_multiplier: float | None = None
    sample_rate: float | None = None
    steps: int | None = None


class Audit(_Part):
    """A lower bound on epsilon from one run (2305.08846), beside the ledger's at the same delta."""

    name: str
    canaries: int = 0
    guesses: int = 0
    correct: int = 0
    confidence: float = 0.95
    epsilon_lower: float | None = None
    delta: float | None = None
    ledger_epsilon_at_delta: float | None = None
    epsilon_rehearsed: float | None = None


class Membership(_Part):
    """A membership test. auc, tpr_at_1pct_fpr: value, low, high."""

    name: str
    members: int = 0
    nonmembers: int = 0
    confidence: float = 0.95
    auc: tuple[float, float, float] | None = None
    tpr_at_1pct_fpr: tuple[float, float, float] | None = None
    roc: tuple[tuple[float, float], ...] = ()


class Planted(_Part):
    """Identifiers that were planted in the records, and how many the model said."""

    prompts: int = 0
    planted: int = 0
    reproduced: int = 0
    reproduced_by_base: int = 0
    samples_per_prompt: int = 1


class Attack(_Part):
    """The whole of attack.json."""

    kind: str = "simulation"
    run: str = ""
    site: str = ""
    ledger: Ledger = Ledger()
    audits: tuple[Audit, ...] = ()
    membership: tuple[Membership, ...] = ()
    planted: Planted | None = None
    scope: str = ""


_Read = TypeVar("_Read", bound=BaseModel)


def read_evaluation(run_dir: Path) -> Evaluation | None:
    """Return a run's evaluation, None where there is none. Raises DataError when it is not one."""
    return _read(run_dir / EVALUATION_FILE, Evaluation, made_by="consilium server evaluate")


def read_attack(run_dir: Path) -> Attack | None:
    """Return a run's audit, None where there is none. Raises DataError when it is not one."""
    return _read(
        run_dir / ATTACK_FILE, Attack, made_by="consilium server audit or consilium simulate attack"
    )


def _read(path: Path, kind: type[_Read], *, made_by: str) -> _Read | None:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        return kind.model_validate(content)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "the whole of it"
        raise DataError(
            f"{path} is malformed at {where}; take it away, or make it anew with {made_by}"
        ) from None
    except (OSError, RecursionError, ValueError):
        raise DataError(
            f"{path} cannot be read as JSON; take it away, or make it anew with {made_by}"
        ) from None
