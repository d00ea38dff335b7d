"""Public reader of `stability.jsonl`, the file in which a monitor keeps what it saw."""

from hf_stable.monitor.log_file import FILE_NAME, read_log

__all__ = ["FILE_NAME", "read_log"]
