"""Errors of the batch job.

ServerError
└── BatchError            the whole job cannot be done, or not go on; what is finished stands
    ├── BatchInputError   an input cannot be found or read (a usage error)
    ├── BatchOutputError  an output cannot be written (a usage error)
    └── BatchBusyError    another process works on the same job

LineError                 one line cannot be answered: it becomes its error line, the job goes on
LaneLostError             an engine or gateway went away with lines in hand; the dispatcher's own
"""

from __future__ import annotations

from server.errors import ServerError


class BatchError(ServerError):
    """A job that cannot be done, or cannot go on now; the same command resumes it."""


class BatchInputError(BatchError):
    """An input that cannot be found or read."""

    exit_code = 2


class BatchOutputError(BatchError):
    """An output that cannot be written."""

    exit_code = 2


class BatchBusyError(BatchError):
    """Another process works on the same job."""


class LineError(Exception):
    """One line that cannot be answered."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        self.message = message
        super().__init__(message)


class LaneLostError(Exception):
    """Whoever was asked went away; lines without an answer are asked again.

    Attributes:
        reached: whether the lines may have got there, so that they may be what it went away of.
    """

    def __init__(self, reason: str, *, reached: bool = True) -> None:
        self.reached = reached
        super().__init__(reason)
