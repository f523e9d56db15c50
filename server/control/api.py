"""The control plane's HTTP API, on a Unix socket in the run's directory.

    POST /bundle {"path": …, "canary": share or null}    GET /bundle
    POST /bundle/promote                                 POST /bundle/abort
    POST /demand {"rates": {expert id: engine seconds per second}}

Knows nothing of keys: who may reach it is the gateways' affair, and the directory's permissions.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.control.errors import BadChangeError, ChangeError
from server.control.publisher import Publisher
from server.sockets import listen_at

Body = TypeVar("Body", bound=BaseModel)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class PublishRequest(BaseModel):
    """Body of `POST /bundle`."""

    model_config = ConfigDict(extra="forbid")

    path: str
    canary: float | None = None


class DemandRequest(BaseModel):
    """Body of `POST /demand`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    rates: dict[str, Annotated[float, Field(ge=0)]]


Demand = Callable[[Mapping[str, float]], Awaitable[None]]


def create_app(publisher: Publisher, demand: Demand) -> web.Application:
    """The application; `publisher` changes bundles, `demand` is told what will be asked for."""

    async def begin(request: web.Request) -> web.Response:
        asked = await _body(request, PublishRequest)
        return web.json_response(publisher.begin(asked.path, asked.canary).model_dump(), status=202)

    async def tell(request: web.Request) -> web.Response:
        return web.json_response(publisher.document)

    async def promote(request: web.Request) -> web.Response:
        return web.json_response(publisher.promote().model_dump(), status=202)

    async def abort(request: web.Request) -> web.Response:
        return web.json_response(publisher.abort().model_dump(), status=202)

    async def expect(request: web.Request) -> web.Response:
        await demand((await _body(request, DemandRequest)).rates)
        return web.json_response({})

    app = web.Application(middlewares=[_errors])
    app.router.add_post("/bundle", begin)
    app.router.add_get("/bundle", tell)
    app.router.add_post("/demand", expect)
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


async def _body(request: web.Request, kind: type[Body]) -> Body:
    try:
        return kind.model_validate_json(await request.read())
    except ValidationError as error:
        where = ", ".join(".".join(map(str, e["loc"])) or "body" for e in error.errors())
        raise BadChangeError(f"the body is not what it should be: {where}") from None


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
