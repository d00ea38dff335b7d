"""The report on training runs: records read, judged, drawn, written."""

from hf_stable.report.writing import FORMATS, WrittenReport, write_report

__all__ = ["FORMATS", "WrittenReport", "write_report"]
