"""The lines of a server's log, as text or as JSON objects: uvicorn's, loraweave's, and one for each request."""

import json
import logging
from datetime import UTC, datetime
from typing import Any

from loraweave import CompositionError


class TextLines(logging.Formatter):
    """A formatter that writes a record's time, level, logger and message, then its `fields` as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        words = [time_of(record), f"{record.levelname:7}", f"{record.name}:", record.getMessage()]
        # quoted, so that no value begins a line or another field
        words += [f"{name}={json.dumps(value)}" for name, value in getattr(record, "fields", {}).items()]
        line = " ".join(words)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonLines(logging.Formatter):
    """A formatter that writes a record as one JSON object, with its `fields` beside time, level, logger and message."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {"time": time_of(record), "level": record.levelname.lower(), "logger": record.name}
        told |= {"message": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


FORMATS = {"text": TextLines, "json": JsonLines}


def time_of(record: logging.LogRecord) -> str:
    """Return the record's time in UTC, to the millisecond, by ISO 8601."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def log_config(log_format: str, log_level: str) -> dict[str, Any]:
    """Return a configuration, for `logging.config.dictConfig`, of all loggers of a server's process, which write to stderr.

    Raises CompositionError for a format other than "text" and "json".
    """
    if log_format not in FORMATS:
        raise CompositionError(f"no log format {log_format!r}; known: {', '.join(FORMATS)}")
    level = log_level.upper()
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": FORMATS[log_format]}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "lines"}},
        "root": {"handlers": ["stderr"]},
        "loggers": {
            "uvicorn": {"level": level, "handlers": [], "propagate": True},
            "loraweave.requests": {"level": level},
        },
    }
