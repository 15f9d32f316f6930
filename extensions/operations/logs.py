"""The lines of a server's log, as text or as JSON objects: uvicorn's, loraweave's, and one for each request."""

import json
import logging
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loraweave import CompositionError


class TextLines(logging.Formatter):
    """A formatter that writes a record's time, level, logger and message, then its `fields` as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        words = [time_of(record), f"{record.levelname:7}", f"{record.name}:", record.getMessage()]
        # quoted, so that no value begins a line or another field
        words += [f"{name}={json.dumps(value)}" for name, value in getattr(record, "fields", {}).items()]
        return " ".join([*words, *([f"error={json.dumps(places_of(record.exc_info[1]))}"] if record.exc_info else [])])


class JsonLines(logging.Formatter):
    """A formatter that writes a record as one JSON object, with its `fields` beside time, level, logger and message."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {"time": time_of(record), "level": record.levelname.lower(), "logger": record.name}
        told |= {"message": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            told["error"] = places_of(record.exc_info[1])
        return json.dumps(told, default=str)


FORMATS = {"text": TextLines, "json": JsonLines}


def places_of(error: BaseException | None) -> str:
    """Return the types of an error and its causes, with the places that they passed; their texts may quote a prompt."""
    told = []
    while error is not None:
        frames = reversed(traceback.extract_tb(error.__traceback__))
        places = (f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
        told.append(f"{type(error).__name__} at {' < '.join(places)}")
        error = error.__cause__ or error.__context__
    return ", after ".join(told)


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
