"""How the log looks: lines for people, or one JSON object a line for machines."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from enum import StrEnum

from ..errors import ConfigError

# An environment variable, so that it holds for the engine's process too.
LEVEL_VARIABLE = "NSA_SERVE_LOG_LEVEL"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


class JsonFormatter(logging.Formatter):
    """Time, level, logger and message; the record's own ``fields``, if any; a trace, if any."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure_logging(kind: LogFormat) -> None:
    """Log to standard error, from the level in ``NSA_SERVE_LOG_LEVEL`` on or else from INFO.

    Raises ``ConfigError`` for a level that there isn't.
    """
    level = os.environ.get(LEVEL_VARIABLE, "INFO").upper()
    if level not in _LEVELS:
        known = ", ".join(_LEVELS).lower()
        raise ConfigError(f"{LEVEL_VARIABLE} is one of {known}, not {level.lower()!r:.40}")
    handler = logging.StreamHandler()
    if kind is LogFormat.JSON:
        handler.setFormatter(JsonFormatter())
    else:
        line = "%(levelname)s %(asctime)s %(message)s"
        handler.setFormatter(logging.Formatter(line, datefmt="%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler])
