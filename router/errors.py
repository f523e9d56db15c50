"""Errors of this room.

IntrovertError
└── RouterError                 anything the router cannot do
    ├── EmbedderNotFoundError   the embedding model is neither on this machine nor downloadable
    ├── ExportError             the embedding model cannot be used by ONNX Runtime
    ├── ClusteringError         the texts cannot be put into the clusters asked for
    ├── CalibrationError        no threshold can be drawn from the held-out text
    ├── RouterFormatError       a saved router that cannot be read
    ├── EmbedderMismatchError   a saved router and the embedder at hand do not belong together
    └── UnroutableError         a request that holds no text to route on
"""

from __future__ import annotations

from configs.errors import IntrovertError


class RouterError(IntrovertError):
    """Base of this room's errors."""


class EmbedderNotFoundError(RouterError):
    """The embedding model is neither on this machine nor can it be downloaded."""


class ExportError(RouterError):
    """The embedding model cannot be exported for ONNX Runtime, or its export cannot be used."""


class ClusteringError(RouterError):
    """The texts cannot be put into the clusters asked for."""


class CalibrationError(RouterError):
    """No abstention threshold can be drawn from the held-out text."""


class RouterFormatError(RouterError):
    """A saved router that is missing, damaged or of another format."""


class EmbedderMismatchError(RouterError):
    """The embedder at hand is not the one the router was fitted with."""


class UnroutableError(RouterError):
    """A request body that holds no text to route on; `field` names the part at fault."""

    def __init__(self, field: str, problem: str) -> None:
        self.field = field
        self.problem = problem
        super().__init__(f"'{field}' {problem}")
