"""The control plane's HTTP API, on a Unix socket in the run's directory.

    POST /bundle {"path": …, "canary": share or null}    GET /bundle
    POST /bundle/promote                                 POST /bundle/abort

Knows nothing of keys: who may reach it is the gateways' affair, and the directory's permissions.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from server.control.errors import BadChangeError, ChangeError
from server.control.publisher import Publisher
from server.sockets import listen_at

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class PublishRequest(BaseModel):
    """Body of `POST /bundle`."""

    model_config = ConfigDict(extra="forbid")

    path: str
    canary: float | None = None


def create_app(publisher: Publisher) -> web.Application:
    """The application; `publisher` does the work."""

    async def begin(request: web.Request) -> web.Response:
        try:
            asked = PublishRequest.model_validate_json(await request.read())
        except ValidationError as error:
            where = ", ".join(".".join(map(str, e["loc"])) or "body" for e in error.errors())
            raise BadChangeError(f"the body is not what it should be: {where}") from None
        return web.json_response(publisher.begin(asked.path, asked.canary).model_dump(), status=202)

    async def tell(request: web.Request) -> web.Response:
        return web.json_response(publisher.document)

    async def promote(request: web.Request) -> web.Response:
        return web.json_response(publisher.promote().model_dump(), status=202)

    async def abort(request: web.Request) -> web.Response:
        return web.json_response(publisher.abort().model_dump(), status=202)

    app = web.Application(middlewares=[_errors])
    app.router.add_post("/bundle", begin)
    app.router.add_get("/bundle", tell)
    app.router.add_post("/bundle/promote", promote)
    app.router.add_post("/bundle/abort", abort)
    return app


@contextlib.asynccontextmanager
async def listening(app: web.Application, socket: Path) -> AsyncIterator[None]:
    """Answer on a Unix socket, in the place of one that a dead process left."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.SockSite(runner, listen_at(socket)).start()
        yield
    finally:
        await runner.cleanup()


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ChangeError as error:
        return _refusal(error.status, error.code, str(error))
    except web.HTTPException as error:
        return _refusal(
            error.status, "not_found" if error.status == 404 else "bad_request", error.reason
        )


def _refusal(status: int, code: str, message: str) -> web.Response:
    body: dict[str, Any] = {
        "error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    }
    return web.Response(status=status, text=json.dumps(body), content_type="application/json")
