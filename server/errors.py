"""Errors of the control plane. The gateway has its own, which become HTTP answers.

IntrovertError
└── ServerError
    ├── PortTakenError        another process listens where the gateway is to listen
    ├── ServingConfigError    a serving config that contradicts itself, the bundle or the machine
    │   └── TopologyError     the cluster cannot hold the workers that the config asks for
    ├── EngineFailedError     a worker's engine does not start
    ├── NotReadyError         the workers were not ready in the time given
    ├── GatewayFailedError    the gateway process does not start
    ├── KeysError             the file of API keys cannot be read, used or written
    ├── ControlFailedError    the control process does not start; another error's text and code
    ├── EngineCallError       an engine refused or did not answer one call; the supervisor's own
    ├── WorkerLostError       a worker's actor is dead or unreachable; the controller's own
    └── NotBegunError         the controller was started again and waits for its orders; the control
                              process' own
"""

from __future__ import annotations

from configs.errors import IntrovertError


class ServerError(IntrovertError):
    """Serving failed in a way that a user can mend."""


class PortTakenError(ServerError):
    """The gateway's port belongs to another process."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(
            f"port {port} on {host} is taken by another process; "
            "stop it or choose another with --set gateway.port=…"
        )


class ServingConfigError(ServerError):
    """A config that cannot be served with this bundle on this machine."""

    exit_code = 2


class TopologyError(ServingConfigError):
    """More workers, or larger ones, than the cluster holds."""


class EngineFailedError(ServerError):
    """A worker gave up starting its engine; `detail` ends with the engine's last words."""

    def __init__(self, worker: str, detail: str) -> None:
        self.worker = worker
        self.detail = detail
        super().__init__(f"{worker} cannot start its engine: {detail}")


class NotReadyError(ServerError):
    """Workers were not ready in time."""


class GatewayFailedError(ServerError):
    """The gateway process ended before it answered."""


class KeysError(ServerError):
    """The file of API keys is not there, says something wrong, or cannot be written."""

    exit_code = 2


class ControlFailedError(ServerError):
    """The control process could not start; the text and exit code are those of its own error."""

    def __init__(self, reason: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(reason)


class EngineCallError(ServerError):
    """One HTTP call to an engine failed: no answer, or a refusal whose reason is the text."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        self.status = status
        """Of the answer; none if there was none."""
        super().__init__(reason)


class WorkerLostError(ServerError):
    """A worker's actor is dead or cannot be reached; Ray starts it again."""


class NotBegunError(ServerError):
    """The controller has not been told what to serve since Ray started it."""
