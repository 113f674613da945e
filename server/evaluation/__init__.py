"""How good a model is: measured on the coordinator's own records, or counted at the sites.

central.py reads the test records; language.py, text_metrics.py and options.py each measure one thing;
counts.py counts no record twice; compare.py puts a result beside its untouched base; results.py is what comes
out, and evaluation.json.
"""

from server.evaluation.central import (
    CentralSet,
    central_files,
    load_central_examples,
    load_central_set,
    record_files,
)
from server.evaluation.compare import compare_with_base, pick_questions, planned_passes
from server.evaluation.counts import CentralCounts
from server.evaluation.language import evaluate, evaluate_model
from server.evaluation.options import check_options
from server.evaluation.results import AtSites, Evaluation, SiteSums

__all__ = [
    "AtSites",
    "CentralCounts",
    "CentralSet",
    "Evaluation",
    "SiteSums",
    "central_files",
    "check_options",
    "compare_with_base",
    "evaluate",
    "evaluate_model",
    "load_central_examples",
    "load_central_set",
    "pick_questions",
    "planned_passes",
    "record_files",
]
