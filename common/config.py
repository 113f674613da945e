"""RunConfig: the frozen tree of everything a run is told, parsed from Flower's flat run config.

RUN.toml, `--set key=value` and Flower's run config all speak the same dotted, kebab-case keys
(`train.local-steps`). Each default lives here once, with its trade-off beside it; pyproject's
`[tool.flwr.app.config]` is generated from this file (`python -m common.config`), and a test compares
the two. Bad keys and values are collected and reported together.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import ConfigDict, Field, ValidationError, field_validator

from common.contradictions import contradictions
from common.errors import ConfigError
from common.toml_section import TomlSection, kebab

# A run's name: it becomes a file's name at every site.
RUN_UID = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"

Scalar: TypeAlias = bool | int | float | str
# The factors of an adapter that a round trains.
TrainedFactors: TypeAlias = Literal["both", "a", "b"]

# Sections that only the coordinator needs. Flower hands the whole run config to every ClientApp, so
# our commands take these out and hand them to the ServerApp through its environment.
COORDINATOR_ONLY = ("evaluation.", "export.", "checkpoint.", "tracking.")

# Sections of which each site is sent a signed copy in its task.
SENT_TO_SITES = ("model.", "lora.", "data.", "train.", "privacy.", "round.")
# Of these, what may differ from one round of a run to the next, and from one site to another.
SET_BY_ROUND = ("lora.rank", "round.trained-factors", "round.frozen-rank")


class _Section(TomlSection):
    model_config = ConfigDict(allow_inf_nan=False)


class ModelSection(_Section):
    """The base model, the same at every site and at the coordinator (compared by digest)."""

    # A local folder, a name that site.toml maps to a folder, a hub name, or "embedded" (simulation).
    name: str = "embedded"
    # A hub revision; ignored for folders, whose digest is signed into every task anyway.
    revision: str = "main"
    # nf4: a quarter of the memory for a little loss; int8: half; none: full precision.
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    # auto: bfloat16 on CUDA, float32 on CPU, where bfloat16 is slower and less exact.
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class LoraSection(_Section):
    """The adapter (Hu et al. 2106.09685)."""

    # Higher fits better, costs upload and, under DP, more noise.
    rank: int = Field(8, ge=1)
    # The update is scaled by alpha / rank; 2 x rank is the common choice.
    alpha: float = Field(16.0, gt=0)
    # Modules with another alpha, as "q_proj=32,layers.0.mlp.down_proj=8": ends of module names, as in
    # PEFT's alpha_pattern. For layers that should learn faster or slower than the rest.
    alpha_pattern: str = ""
    # Regularises long runs on little data; 0 keeps steps comparable.
    dropout: float = Field(0.0, ge=0, lt=1)
    # "all-linear" fits best per step; "q_proj,v_proj" halves upload and DP noise.
    target_modules: str = "all-linear"
    # Scales by alpha / sqrt(rank) (2312.03732): steadier at ranks above 64, and where sites' ranks differ.
    use_rslora: bool = False
    # DoRA (2402.09353); refused under DP, where its magnitude has no per-sample gradient.
    use_dora: bool = False

    @field_validator("alpha_pattern")
    @classmethod
    def _well_formed(cls, value: str) -> str:
        _parse_alphas(value)
        return value

    @property
    def alphas(self) -> dict[str, float]:
        """The end of a module's name -> its own alpha, from alpha_pattern; the first that fits counts."""
        return _parse_alphas(self.alpha_pattern)


def _parse_alphas(text: str) -> dict[str, float]:
    alphas: dict[str, float] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (part.strip() for part in entry.partition("="))
        try:
            alpha = float(number)
        except ValueError:
            alpha = math.nan
        if not re.fullmatch(r"\w+(\.\w+)*", name) or not 0 < alpha < math.inf:
            raise ValueError(f"{entry!r} is not NAME=ALPHA, as in 'q_proj=32,down_proj=8'")
        if name in alphas:
            raise ValueError(f"{name!r} has two alphas; keep one")
        alphas[name] = alpha
    return alphas


class DataSection(_Section):
    """How a record becomes tokens."""

    # "instruction", "question" or a text with {instruction}, {input}; the answer follows it.
    prompt_template: str = "instruction"
    # Tokens per record; attention cost grows with its square, answers beyond it are cut.
    max_length: int = Field(256, ge=8)
    # Rows whose `split` column equals this are used; data without such a column is used whole.
    split: str = "train"


class TrainSection(_Section):
    """Local training at each site."""

    # More rounds of fewer steps drift less and send more.
    rounds: int = Field(5, ge=1, le=10_000)
    # Steps between merges.
    local_steps: int = Field(20, ge=1, le=100_000)
    # Records per step (their expected number under DP; patients, when they are the unit). DP wants it
    # large: noise is per step.
    batch_size: int = Field(16, ge=1)
    # Records in memory at once; lower it when memory runs out, the result stays the same.
    micro_batch_size: int = Field(16, ge=1)
    # AdamW on LoRA likes 1e-3 to 1e-2 for small models, 1e-4 to 3e-4 for large ones.
    learning_rate: float = Field(2e-3, gt=0)
    # linear decays to 0 over the whole run, all rounds together; constant stays after warm-up.
    schedule: Literal["linear", "constant"] = "linear"
    # Share of the whole run's steps spent rising from 0.
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    # paged-adamw-8bit (bitsandbytes, CUDA only) takes a quarter of AdamW's state.
    optimizer: Literal["adamw", "sgd", "paged-adamw-8bit"] = "adamw"
    # Decay pulls the adapter, and so the model, back to the base.
    weight_decay: float = Field(0.0, ge=0)
    # Recomputes activations: a third more time for much less memory.
    gradient_checkpointing: bool = False
    # Makes the initial adapter and, without DP, the order of records. Never DP noise or sampling.
    seed: int = Field(0, ge=0, lt=2**32)


class PrivacySection(_Section):
    """What the coordinator asks for; a site's own policy may demand more, never less."""

    # patient: all records of a patient are hidden together; record: one record is; none: no protection.
    # A patient costs more noise than a record, and is what a hospital usually owes its patients.
    unit: Literal["record", "patient", "none"] = "record"
    # The whole run's epsilon at each site. 8 is the customary upper end, 1 to 3 strong.
    target_epsilon: float = Field(8.0, gt=0, le=1e6)
    # Below 1 / records; the chance that the guarantee fails.
    target_delta: float = Field(1e-5, gt=0, lt=1)
    # The gradient of each unit is clipped to it. Lower: less noise, more bias.
    max_grad_norm: float = Field(1.0, gt=0)
    # At most so many records of a patient in a step, drawn afresh each time; their mean gradient
    # counts. More: less variance in a patient's own gradient, more time; only used for unit "patient".
    max_records_per_patient: int = Field(4, ge=1, le=4096)
    # "auto" calibrates once for all rounds; a number > 0 fixes it and epsilon follows.
    noise_multiplier: str | float = "auto"
    # prv is tight (2106.02848); rdp is an upper bound that computes at once.
    accountant: Literal["prv", "rdp"] = "prv"

    @field_validator("noise_multiplier", mode="before")
    @classmethod
    def _auto_or_positive(cls, value: object) -> str | float:
        if value == "auto":
            return "auto"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f'{value!r} is neither "auto" nor a number')
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(
                f"{value} gives no privacy; use a number above 0, or privacy.unit = "
                '"none" to train without protection and say so'
            )
        if not 1e-3 <= value <= 1e3:
            raise ValueError(f"{value} is beyond any sensible noise; use 0.001 to 1000")
        return float(value)


class FederationSection(_Section):
    """Who takes part in a round, and how long it waits."""

    # A round starts when so many sites are there.
    min_sites: int = Field(2, ge=1)
    # Usable replies without which nothing is merged; 0 means: as many as min-sites.
    quorum: int = Field(0, ge=0)
    # Seconds a round waits for replies; slower sites lose their place in that round.
    deadline_s: float = Field(3600.0, gt=0)
    # Seconds to wait for min-sites before giving up.
    join_timeout_s: float = Field(600.0, gt=0)
    # The same while a site says that its hospital has yet to approve the run: people take longer.
    approval_timeout_s: float = Field(86_400.0, gt=0)
    # Share of the sites drawn for each round; below 1 also lowers what each site spends.
    fraction: float = Field(1.0, gt=0, le=1)
    # How often a round below quorum is tried again before the run stops.
    max_retries: int = Field(2, ge=0)


class CheckpointSection(_Section):
    """What a run keeps on disk."""

    # The newest so many rounds are kept, and the one of the lowest central loss; 0 keeps all. With 1, a
    # damaged one cannot be replaced by the one before.
    keep: int = Field(3, ge=0)


class AggregationSection(_Section):
    """How updates become one adapter (server/aggregation)."""

    # svd: best rank-r approximation of the mean update, any mix of ranks. weighted: mean of the factors.
    # stack: exact, the adapter grows by the sites' ranks. ffa, fedsvd: only B is trained, exact, and noise on
    # half the weights. rolora: B and A by turns. fedex: mean of the factors, and what it misses sent beside
    # it, which grows too, as far as each site's policy.max-rank holds it. svd was best or within 4 % in five
    # seeds on three scenarios (README), but with mixed ranks and DP: take weighted or lora.use-rslora there.
    method: Literal["svd", "weighted", "stack", "ffa", "fedsvd", "rolora", "fedex"] = "svd"
    # declared-size weighs by the public size of each site's data; equal counts each site once.
    weighting: Literal["declared-size", "equal"] = "declared-size"
    # norm-clip: no update counts for more than clip-norm; geometric-median: nearly half of the weight may
    # be wrong altogether, and the mean is lost where honest sites differ much.
    robust: Literal["none", "norm-clip", "geometric-median"] = "none"
    # Frobenius norm of a whole update, all modules together; 0 takes the median of the round's updates.
    clip_norm: float = Field(0.0, ge=0)
    # A site whose update is larger (same norm; where a method averages factors, how far they moved counts
    # too) is refused. 0 refuses only what no training makes.
    max_update_norm: float = Field(0.0, ge=0)
    # Carries so much of each round's update into the next: faster on steady progress, unsteady on noise.
    server_momentum: float = Field(0.0, ge=0, lt=1)


class RoundSection(_Section):
    """What one round asks of a site; the coordinator says it by aggregation.method, RUN.toml never."""

    # The factors that are trained; the other one stays as it was sent.
    trained_factors: TrainedFactors = "both"
    # So many ranks of the adapter that is sent, its last ones, are not trained and not sent back.
    frozen_rank: int = Field(0, ge=0)


# What evaluation.metrics may name.
_METRICS = frozenset({"loss", "generation", "options"})


def _names(text: str) -> set[str]:
    return {name for part in text.split(",") if (name := part.strip())}


class EvaluationSection(_Section):
    """Central evaluation; never sent to a site."""

    # JSONL held by the coordinator; "" evaluates nothing.
    central_data: str = ""
    # Rows whose `split` column equals this are used; data without such a column is used whole.
    split: str = "test"
    # At most so many records, the first of each file; 0 takes all.
    max_records: int = Field(0, ge=0)
    # Every so many rounds, and always after the last.
    every: int = Field(1, ge=1)
    # Records per forward pass.
    batch_size: int = Field(16, ge=1)
    # What the finished run is measured by, beside its base: "loss" always, "generation" (exact match, F1,
    # ROUGE-L, BLEU of greedy answers: slow), "options" (a choice among labels, by likelihood), with commas.
    metrics: str = "loss"
    # The options, with commas: "yes,no,maybe"; "" takes the answers that the test records have.
    labels: str = ""
    # A column whose groups are measured one by one, or "file"; "" takes `site`, or the files if several.
    group_by: str = ""
    # A file of questions that base and result answer side by side; "" takes test records of all groups.
    questions: str = ""
    # So many of them; 0 asks none.
    num_questions: int = Field(5, ge=0)
    # Tokens of a generated answer. More tells more of long answers and takes longer.
    max_new_tokens: int = Field(48, ge=1)
    # Answers are generated for at most so many records, spread over all; 0 takes all.
    max_generated: int = Field(200, ge=0)
    # Let the sites count, once, on test records of their own, where their policy allows it: for who has no
    # public ones. Sums and counts leave them, which no epsilon covers.
    at_sites: bool = False
    # Evaluations in a row without a lower central loss after which the run stops, which spends less of
    # each site's budget; 0 never stops early. With export.round = "best" it hands out what it stopped for.
    patience: int = Field(0, ge=0)

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, value: str) -> str:
        unknown = sorted(_names(value) - _METRICS)
        if unknown:
            raise ValueError(
                f"{', '.join(map(repr, unknown))} is none of {', '.join(sorted(_METRICS))}"
            )
        return value

    @property
    def metric_names(self) -> frozenset[str]:
        """What evaluation.metrics names; "loss" always."""
        return frozenset(_names(self.metrics) | {"loss"})


class ExportSection(_Section):
    """What a finished run writes."""

    # adapter: a PEFT folder that PeftModel.from_pretrained loads.
    formats: Literal["adapter"] = "adapter"
    # last: what all rounds made; best: the round of the lowest central loss, which was then chosen on
    # the central data and looks better there than elsewhere.
    round: Literal["last", "best"] = "last"


class TrackingSection(_Section):
    """Who else is told a run's numbers, in local files; needs the extra `tracking`. Never sent to a site."""

    # A folder for TensorBoard's event files, relative to RUN.toml; "" is off. Sees all runs in one page.
    tensorboard: str = ""
    # A folder for MLflow's database; "" is off. Finds runs by their settings, takes seconds to start.
    mlflow: str = ""


class RunSection(_Section):
    """The run's own identity, made by our commands."""

    # Made once and kept on resume; Flower's run id changes when a run is submitted again.
    uid: str = Field("", pattern=f"^({RUN_UID})?$")


class RunConfig(_Section):
    """Everything a run is told. Frozen; build it with `RunConfig.parse`."""

    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    privacy: PrivacySection = PrivacySection()
    federation: FederationSection = FederationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    aggregation: AggregationSection = AggregationSection()
    round: RoundSection = RoundSection()
    evaluation: EvaluationSection = EvaluationSection()
    export: ExportSection = ExportSection()
    tracking: TrackingSection = TrackingSection()
    run: RunSection = RunSection()

    @classmethod
    def parse(cls, flat: Mapping[str, Any]) -> RunConfig:
        """Return the tree for dotted keys.

        flat: dotted key -> scalar; missing keys take their defaults.
        Raises ConfigError naming every bad key and value at once.
        """
        problems: list[str] = []
        tree: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            section, _, name = key.partition(".")
            if key not in _DEFAULTS:
                problems.append(f"  {key}: no such key{_suggestion(key)}")
            else:
                tree.setdefault(section, {})[name] = value
        config = None
        try:
            config = cls.model_validate(tree)
        except ValidationError as error:
            for item in error.errors():
                key = ".".join(kebab(str(part)) for part in item["loc"][:2])
                problem = item["msg"].removeprefix("Value error, ")
                problems.append(f"  {key} = {item['input']!r}: {problem}")
        if config is not None:
            problems += [f"  {problem}" for problem in contradictions(config)]
        if problems or config is None:
            count = "1 bad setting" if len(problems) == 1 else f"{len(problems)} bad settings"
            raise ConfigError(f"{count}:\n" + "\n".join(dict.fromkeys(problems)))
        return config

    def flat(self) -> dict[str, Scalar]:
        """Return every key in its dotted form, in the order of this file."""
        return {
            f"{kebab(section)}.{kebab(name)}": value
            for section, content in self
            for name, value in content
        }

    def for_sites(self) -> dict[str, Scalar]:
        """Return the keys that each site is sent a signed copy of."""
        return {k: v for k, v in self.flat().items() if k.startswith(SENT_TO_SITES)}

    def replace(self, changes: Mapping[str, Scalar]) -> RunConfig:
        """Return the same tree with some dotted keys changed. Raises ConfigError as `parse` does."""
        return RunConfig.parse({**self.flat(), **changes})

    @property
    def quorum(self) -> int:
        """Usable replies that a round needs."""
        return self.federation.quorum or self.federation.min_sites

    @property
    def total_steps(self) -> int:
        """Optimizer steps of one site over the whole run."""
        return self.train.rounds * self.train.local_steps

    @property
    def use_dp(self) -> bool:
        """Whether local training is differentially private."""
        return self.privacy.unit != "none"


def _suggestion(key: str) -> str:
    close = difflib.get_close_matches(key, list(_DEFAULTS), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as dotted keys, the way Flower flattens a run config."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file as a tree. Raises ConfigError when it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no file {path}; check the path") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}; correct that line") from None


def parse_overrides(overrides: Iterable[str]) -> dict[str, Scalar]:
    """Return `key=value` words as dotted keys; values are read as TOML, else as text.

    Raises ConfigError naming the word that has no `=`.
    """
    parsed: dict[str, Scalar] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"--set {word!r} has no '='; write --set key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        parsed[key.strip()] = value if isinstance(value, bool | int | float | str) else text.strip()
    return parsed


def load_run_config(path: Path, *, overrides: Iterable[str] = ()) -> RunConfig:
    """Return RUN.toml with `key=value` overrides applied. Raises ConfigError."""
    return RunConfig.parse({**flatten(read_toml(path)), **parse_overrides(overrides)})


_DEFAULTS: dict[str, Scalar] = RunConfig().flat()


def default_table() -> str:
    """Return the body of pyproject's `[tool.flwr.app.config]`: every key with its default."""
    lines = []
    for key, value in _DEFAULTS.items():
        text = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
        lines.append(f"{key} = {text}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(default_table())
