"""Settings of a run that are each good and do not go together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.config import RunConfig

# Methods of aggregation that keep a velocity beside the adapter, of the same rank.
_WITH_MOMENTUM = ("svd", "ffa", "fedsvd")
# Methods whose result follows from the sites' products alone.
_BY_PRODUCT = ("svd", "stack", "ffa", "fedsvd")


def contradictions(config: RunConfig) -> Iterable[str]:
    """Yield in words what does not go together in a run's settings, with what to do."""
    if config.lora.use_dora and not config.use_dp:
        yield (
            "lora.use-dora = true: only the factors A and B travel, and DoRA's magnitude vector would be "
            "lost with every round; turn it off"
        )
    if config.lora.use_dora and config.use_dp:
        yield (
            "lora.use-dora = true with privacy.unit = "
            f"{config.privacy.unit!r}: DoRA's magnitude vector has no per-record gradient; turn one off"
        )
    if config.federation.quorum > config.federation.min_sites:
        yield (
            f"federation.quorum = {config.federation.quorum} is above federation.min-sites = "
            f"{config.federation.min_sites}: a round may start that can never reach it"
        )
    if config.aggregation.server_momentum and config.aggregation.method not in _WITH_MOMENTUM:
        yield (
            f"aggregation.server-momentum = {config.aggregation.server_momentum} is kept at lora.rank, of "
            f"whole updates: aggregation.method = {config.aggregation.method!r} has none; use 0, or one of "
            f"{', '.join(_WITH_MOMENTUM)}"
        )
    if config.aggregation.robust != "none" and config.aggregation.method not in _BY_PRODUCT:
        yield (
            f"aggregation.robust = {config.aggregation.robust!r} compares products, and aggregation.method = "
            f"{config.aggregation.method!r} averages factors, and what moves in a factor need not show in "
            f"the product; use one of {', '.join(_BY_PRODUCT)}"
        )
    if config.aggregation.clip_norm and config.aggregation.robust != "norm-clip":
        yield (
            f"aggregation.clip-norm = {config.aggregation.clip_norm} does nothing with aggregation.robust = "
            f"{config.aggregation.robust!r}; set that to 'norm-clip', or this to 0"
        )
    chosen_by_loss = config.evaluation.patience or config.export.round == "best"
    if chosen_by_loss and not config.evaluation.central_data:
        yield (
            f"evaluation.patience = {config.evaluation.patience} and export.round = "
            f"{config.export.round!r} go by the central loss, and evaluation.central-data is empty; name "
            "the coordinator's test records, or use 0 and 'last'"
        )
    if (
        config.privacy.unit == "patient"
        and config.privacy.max_records_per_patient > config.train.micro_batch_size
    ):
        yield (
            f"privacy.max-records-per-patient = {config.privacy.max_records_per_patient} is above "
            f"train.micro-batch-size = {config.train.micro_batch_size}: a patient's records are never "
            "split, so raise the one or lower the other"
        )
    if config.use_dp and config.privacy.target_delta >= 0.01:
        yield (
            f"privacy.target-delta = {config.privacy.target_delta}: a chance of 1 % or more that the "
            "guarantee fails protects nobody; use at most 1 / records, 1e-5 say"
        )
