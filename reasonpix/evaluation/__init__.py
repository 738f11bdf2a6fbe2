"""Evaluation: methods side by side on a benchmark, scored and reported.

Code that reads the folder of an evaluation imports the names below.
"""

from typing import TYPE_CHECKING

from reasonpix.core.lazy import lazy_exports

__all__ = ["COPY", "TRUTH", "CaseRecord", "EvaluationFolder"]

if TYPE_CHECKING:
    from reasonpix.evaluation.results import COPY, TRUTH, CaseRecord, EvaluationFolder
else:
    __getattr__ = lazy_exports(__name__, {"results": __all__})
