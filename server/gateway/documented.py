"""Error answers as the OpenAPI document has them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from server.gateway.answers import ErrorAnswer

Responses = dict[int | str, dict[str, Any]]

ALWAYS = (400, 408, 431, 500)
"""What any request may be answered: it was no HTTP, came too slowly or with too large a head, or
there is a defect."""


def errors(*statuses: int | str, model: type[BaseModel] = ErrorAnswer) -> Responses:
    """OpenAPI entries for error answers: those of a route, and those of all."""
    everything = sorted({*ALWAYS, *statuses}, key=str)
    return {status: {"model": model} for status in everything}
