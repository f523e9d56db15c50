"""Lines of the output: OpenAI's batch format, with who answered beside it. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec

from server.batch.errors import LineError
from server.batch.types import Answer, Line

BASE = "base"
OK = 200

_JSON = msgspec.json.Encoder()


def answer_line(line: Line, answer: Answer, where: Mapping[str, object]) -> bytes:
    """The line of an answered request, without its newline."""
    return _JSON.encode(
        {
            "id": _id("batch_req", line.custom_id, line.number),
            "custom_id": line.custom_id,
            "response": _response(line, answer),
            "error": None,
            "introvert": _provenance(line, answer, where),
        }
    )


def refused_line(line: Line, answer: Answer, where: Mapping[str, object]) -> bytes:
    """The line of a request that whoever was asked refused."""
    code, message = _reason(answer)
    return _JSON.encode(
        {
            "id": _id("batch_req", line.custom_id, line.number),
            "custom_id": line.custom_id,
            "response": _response(line, answer),
            "error": {"code": code, "message": message},
            "introvert": _provenance(line, answer, where),
        }
    )


def fault_line(
    number: int, custom_id: str | None, error: LineError, where: Mapping[str, object]
) -> bytes:
    """The line of what could not be asked."""
    return _JSON.encode(
        {
            "id": _id("batch_req", custom_id or "", number),
            "custom_id": custom_id,
            "response": None,
            "error": {"code": error.code, "message": error.message},
            "introvert": dict(where),
        }
    )


def split_target(target: str) -> tuple[str, str | None]:
    """Expert and version of a served name; a name without a version has none."""
    expert, at, version = target.partition("@")
    return (expert, version) if at else (target, None)


def _response(line: Line, answer: Answer) -> dict[str, object]:
    return {
        "status_code": answer.status,
        "request_id": _id("req", line.custom_id, line.number),
        "body": msgspec.Raw(answer.body),
    }


def _provenance(line: Line, answer: Answer, where: Mapping[str, object]) -> dict[str, object]:
    expert, version = split_target(line.target)
    if answer.expert is not None:
        expert, version = answer.expert, answer.version
    score = line.score if line.score is not None else answer.score
    return {
        "expert": expert,
        "version": version,
        "route_score": None if score is None else round(score, 6),
        **where,
    }


def _reason(answer: Answer) -> tuple[str, str]:
    try:
        error = msgspec.json.decode(answer.body)["error"]
        code = error.get("code")  # engines give the status here, gateways a word
        kind = code if isinstance(code, str) else error.get("type")
        return str(kind or answer.status), str(error["message"])
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return str(answer.status), answer.body[:300].decode(errors="replace")


def _id(prefix: str, custom_id: str, number: int) -> str:
    """The same for the same line, whichever run of the job answers it."""
    digest = hashlib.blake2b(f"{number}:{custom_id}".encode(), digest_size=12).hexdigest()
    return f"{prefix}_{digest}"
