"""Log lines."""

from __future__ import annotations

import json
import logging
import sys

from server.gateway.logs import JsonLines


def record(**more: object) -> logging.LogRecord:
    fields = {"name": "a.b", "levelname": "WARNING", "msg": "%s\nlines", "args": ("two",), **more}
    return logging.makeLogRecord(fields)


def test_a_record_is_one_line_of_json() -> None:
    line = JsonLines().format(record(request_id="r1", created=0))
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:00.000+00:00",
        "level": "warning",
        "logger": "a.b",
        "message": "two\nlines",
        "request_id": "r1",
    }


def test_a_traceback_is_part_of_it() -> None:
    try:
        raise ValueError("the cause")
    except ValueError:
        line = JsonLines().format(record(exc_info=sys.exc_info()))
    assert "ValueError: the cause" in json.loads(line)["traceback"]
