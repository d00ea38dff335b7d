"""The report on training runs: records read, judged, drawn, written."""

from hf_stable.report.writing import FORMATS, WrittenReport, require_plotly, write_report

__all__ = ["FORMATS", "WrittenReport", "require_plotly", "write_report"]
