"""Can the records be read, and are there as many as site.toml tells the coordinator?

What is counted here is shown to the hospital alone: none of it is logged or sent. The file's name is not
even shown, because it may be a patient's, and such output is sent around when people ask for help.
"""

from __future__ import annotations

from collections.abc import Iterator

from client.check_line import CheckLine, failed, passed, warned
from client.site_config import SITE_FILE, SiteConfig
from common.config import RunConfig
from common.errors import DataError

# How far declared-size may be from the true count before it says something wrong of this site's weight
# and of its sampling rate.
_MAX_RATIO = 2.0


def check_data(config: SiteConfig) -> Iterator[CheckLine]:
    """Read the whole data set as a task would, and count it."""
    # Here, because they load torch.
    from client.examples import columns_of
    from client.training import FEW_PATIENTS
    from common.dataset import load_records

    by_patient = config.data.unit == "patient"
    # The run names the split; this is what it is called unless it says otherwise.
    split = RunConfig.parse({}).data.split
    try:
        records = load_records(
            config.data_path,
            columns=columns_of(config.data, by_patient=by_patient),
            split=split,
            name="data.path",
        )
    except DataError as error:
        yield failed("data", str(error), f"correct [data] in {SITE_FILE}, or the data set")
        return
    except OSError as error:
        yield failed(
            "data", f"data.path cannot be read ({error.strerror})", "let the agent's user read it"
        )
        return
    units = len(records.patients) if by_patient else len(records)
    of_patients = f" of {units} patients" if by_patient else ""
    yield passed(
        "data",
        f"{len(records)} usable records{of_patients}, {records.num_skipped} skipped as incomplete "
        f"(data.split {split!r})",
    )
    yield _declared(config, units)
    if by_patient and units < FEW_PATIENTS:
        yield warned(
            "patients",
            f"{units}, fewer than {FEW_PATIENTS}: their protection needs more noise than they give signal",
            "expect little of this site alone, or gather more patients",
        )


def _declared(config: SiteConfig, units: int) -> CheckLine:
    declared, unit = config.data.declared_size, config.data.unit
    detail = f"{declared} declared, {units} {unit}s here"
    if units * _MAX_RATIO < declared or units > declared * _MAX_RATIO:
        return warned(
            "declared size",
            detail,
            f"set data.declared-size in {SITE_FILE} to a public round number near the true count, and "
            "enrol again with it",
        )
    return passed("declared size", detail)
