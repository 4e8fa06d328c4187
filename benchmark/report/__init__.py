"""From run directories to what goes into a paper: statistics, tables, plots, one page."""

from benchmark.report.writer import NoEvaluationError, Options, write_report

__all__ = ["NoEvaluationError", "Options", "write_report"]
