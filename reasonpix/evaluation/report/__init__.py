"""The report of an evaluation: a page, a CSV file, a JSON file, and tables on the console.

It is made from the evaluation folder alone: the same folder gives the same bytes.
"""

from reasonpix.evaluation.report.tables import print_tables
from reasonpix.evaluation.report.writer import write_report

__all__ = ["print_tables", "write_report"]
