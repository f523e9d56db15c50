"""Text to expert: which cluster a text belongs to, and when to leave it to the base.

Knows nothing of language models, HTTP or Ray. Importing this package costs next to nothing: the
names below are fetched from their modules when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from router.calibration import Calibration
    from router.conversation import Message, request_messages, routing_text
    from router.embedder import Embedder, load_embedder
    from router.errors import RouterError, UnroutableError
    from router.model import Router
    from router.types import Candidate, Route

_HOMES = {
    "Calibration": "router.calibration",
    "Candidate": "router.types",
    "Embedder": "router.embedder",
    "Message": "router.conversation",
    "Route": "router.types",
    "Router": "router.model",
    "RouterError": "router.errors",
    "UnroutableError": "router.errors",
    "load_embedder": "router.embedder",
    "request_messages": "router.conversation",
    "routing_text": "router.conversation",
}

__all__ = [
    "Calibration",
    "Candidate",
    "Embedder",
    "Message",
    "Route",
    "Router",
    "RouterError",
    "UnroutableError",
    "load_embedder",
    "request_messages",
    "routing_text",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
