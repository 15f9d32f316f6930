"""The fixtures of `member_rows.py`."""

from member_rows import engine_of, ids, padded, rows  # noqa: F401
