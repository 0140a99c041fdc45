"""Logs as one JSON object a line."""

from __future__ import annotations

import datetime
import json
import logging
import sys
import warnings
from typing import Any

from PIL import Image

logger = logging.getLogger("rlrr_kernels.serve")


class JsonFormatter(logging.Formatter):
    """A record as a JSON object: time (UTC), level, event, what :func:`log` was given, and a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        entry = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def log(level: int, event: str, *, exc_info: Any = None, **fields: Any) -> None:
    """Writes a line about ``event``."""
    logger.log(level, event, exc_info=exc_info, extra={"fields": fields})


def write_logs() -> None:
    """Has this package's server, uvicorn, asyncio and warnings write JSON lines to the standard error stream."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("rlrr_kernels.serve", "uvicorn", "uvicorn.error", "asyncio"):
        found = logging.getLogger(name)
        found.handlers, found.propagate = [handler], False
        found.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").handlers = []  # to its parent, uvicorn
    logging.getLogger("uvicorn.error").propagate = True
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the server's limit is another
    warnings.showwarning = lambda message, *_, **__: log(logging.WARNING, str(message))
