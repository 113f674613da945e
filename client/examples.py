"""A site's own records as tokens: read, scrubbed and grouped by patient; kept between rounds."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from client.scrub import Scrubber
from client.site_config import DataSection, SiteConfig
from common.config import RunConfig
from common.dataset import Columns, load_records
from common.errors import DataError
from common.model import BaseModel
from common.prompts import Examples, resolve_template, tokenize_all

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LocalExamples:
    """One site's training records. All counts here are the hospital's own and never leave it.

    patients: for each patient the places of its records; None when records are the unit.
    num_skipped: records without a question, an answer or a patient. scrubbed: identifiers replaced.
    """

    examples: Examples
    patients: tuple[tuple[int, ...], ...] | None
    num_skipped: int
    scrubbed: dict[str, int]


def columns_of(data: DataSection, *, by_patient: bool) -> Columns:
    """Return what a site's data set calls its columns. by_patient: also the one that tells them apart."""
    own = data.columns
    patient = data.patient_id if by_patient else ""
    return Columns(own.instruction, own.input, own.output, own.split, patient, data.name_columns)


class ExampleStore:
    """Reads a site's records when they are first asked for, and again when they change."""

    def __init__(self, config: SiteConfig) -> None:
        self._config = config
        self._kept: tuple[tuple[str, int, str, str, bool, int], LocalExamples] | None = None

    def load(self, base: BaseModel, run: RunConfig, *, test_split: str = "") -> LocalExamples:
        """Return the records as tokens of `base`. Raises DataError without a word of any record.

        test_split: of this split in place of the run's, which every record must then name; grouped by patient
        where patients are the data set's own unit.
        """
        data = run.data
        unit = self._config.data.unit if test_split else run.privacy.unit
        by_patient = unit == "patient"
        key = (
            data.prompt_template, data.max_length, test_split or data.split, base.digest, by_patient,
            self._modified_ns(),
        )  # fmt: skip
        if self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        loaded = self._read(base, run, by_patient=by_patient, test_split=test_split)
        self._kept = (key, loaded)
        return loaded

    def forget(self) -> None:
        """Let the records leave the memory."""
        self._kept = None

    def _read(
        self, base: BaseModel, run: RunConfig, *, by_patient: bool, test_split: str
    ) -> LocalExamples:
        own = self._config.data
        scrubber = Scrubber(own.scrub) if own.scrub else None
        records = load_records(
            self._config.data_path,
            columns=columns_of(own, by_patient=by_patient),
            split=test_split or run.data.split,
            split_required=bool(test_split),
            rewrite=scrubber.scrub if scrubber is not None else None,
            # Not its path: a file's name may be a patient's.
            name="data.path",
        )
        if by_patient and not records.patients:
            raise DataError(f"no record has a patient in column {own.patient_id!r}")
        scrubbed = dict(scrubber.counts) if scrubber is not None else {}
        if scrubber is not None:
            logger.info("identifiers replaced: %s", scrubbed)
        examples = tokenize_all(
            records.prompts,
            tokenizer=base.tokenizer,
            template=resolve_template(run.data.prompt_template),
            max_length=run.data.max_length,
        )
        patients = records.patients if by_patient else None
        return LocalExamples(examples, patients, records.num_skipped, scrubbed)

    def _modified_ns(self) -> int:
        """When the data set last changed; 0 where it cannot be asked (loading will say why)."""
        path = self._config.data_path
        try:
            return max(part.stat().st_mtime_ns for part in (path, *path.glob("*")))
        except OSError:
            return 0
