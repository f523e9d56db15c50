"""The endpoints that the gateway answers itself.

They look at the parts and change nothing. What is forwarded to engines is in `forward`.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError

from server.gateway.answers import (
    Health,
    ModelAnswer,
    ModelList,
    ReadyAnswer,
    RouteList,
    RouteRequest,
    explain_route,
    list_models,
    report_ready,
)
from server.gateway.documented import errors
from server.gateway.errors import (
    ForbiddenModelError,
    InvalidParameterError,
    ModelNotFoundError,
    NoEngineError,
)
from server.gateway.federation import Federation
from server.gateway.limits import body_of_request, limited_head
from server.gateway.parts import Parts
from server.gateway.protocol import parse_object
from server.gateway.scrape import Scrape
from server.gateway.tenants import ANYBODY, Tenant

TEXT = {"content": {"text/plain": {"schema": {"type": "string"}}}}


def own_routes(parts: Parts, scrape: Scrape) -> APIRouter:
    """Models, route explanation, health and metrics."""
    routes = APIRouter(dependencies=[limited_head(parts.config)])

    @routes.get("/health", tags=["operation"], responses=errors())
    async def health() -> Health:
        """Whether the process is alive; says nothing about engines."""
        return Health()

    @routes.get("/ready", tags=["operation"], responses={**errors(), 503: {"model": ReadyAnswer}})
    async def ready(response: Response) -> ReadyAnswer:
        """200 once every expert has been ready or refused, while one worker is ready; else 503."""
        answer = report_ready(parts.readiness, parts.routing.status)
        if not answer.ready:
            response.status_code = 503
            response.headers["retry-after"] = str(parts.config.retry_after_s)
        return answer

    @routes.get(
        "/metrics",
        tags=["operation"],
        response_class=Response,
        responses={200: TEXT, **errors()},
    )
    async def metrics() -> Response:
        """Counters, gauges and histograms of all gateway processes in Prometheus' text format.

        It needs no key: bind the gateway to an address, or have a firewall, that keeps others out.
        """
        return Response(await scrape.all(), media_type=CONTENT_TYPE_LATEST)

    federation = Federation(lambda: parts.chooser.table, parts.seat.engine_key)

    @routes.get(
        "/metrics/engines",
        tags=["operation"],
        response_class=Response,
        responses={200: TEXT, **errors()},
    )
    async def engine_metrics() -> Response:
        """The metrics of all ready workers' engines, each with a `worker` label; open as
        `/metrics` is."""
        return Response(await federation.all(), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/v1/models", tags=["models"], responses=errors(401, 503))
    async def models(request: Request) -> ModelList:
        """Every model name that the API key may ask, with its readiness."""
        return ModelList(data=_models(parts, _tenant(parts, request)))

    # Any text is a valid path here, so the 422 that FastAPI would announce cannot happen.
    @routes.get(
        "/v1/models/{model:path}", tags=["models"], responses=errors("4XX", 401, 403, 404, 503)
    )
    async def model(model: str, request: Request) -> ModelAnswer:
        """One model by its name, or by the name with its version."""
        tenant = _tenant(parts, request)
        for known in _models(parts, ANYBODY):
            if model in (known.id, known.served_name):
                if not _may_see(tenant, known):
                    raise ForbiddenModelError(
                        f"The API key '{tenant.name}' may not ask '{known.id}'. GET /v1/models "
                        "lists what it may.",
                        param="model",
                    )
                return known
        parts.chooser.named(model)  # says why there is none
        raise ModelNotFoundError(f"There is no model '{model[:200]}'.", param="model")

    @routes.post(
        "/v1/route",
        tags=["models"],
        responses=errors(401, 413, 429, 503),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": RouteRequest.model_json_schema()}},
            }
        },
    )
    async def route(request: Request) -> RouteList:
        """Where texts or a chat of this API key would go, and why; nothing is generated."""
        tenant = _tenant(parts, request)
        body = await body_of_request(request, parts.config, parts.config.max_prompt_bytes)
        asked = _route_request(body)
        view = parts.chooser.served  # and its router: both of one bundle, whatever is published
        with parts.keyring.admit(tenant):
            if asked.messages is not None:
                routed = await parts.routing.route(
                    "chat", [{"messages": asked.messages}], bundle=view.bundle
                )
            else:
                texts = [asked.input] if isinstance(asked.input, str) else asked.input or []
                routed = await parts.routing.route(
                    "responses", [{"input": t} for t in texts], bundle=view.bundle
                )
        threshold = parts.routing.threshold_of(view.bundle)
        return RouteList(data=[explain_route(r, view, threshold, tenant.may_ask) for r in routed])

    return routes


def _tenant(parts: Parts, request: Request) -> Tenant:
    return parts.keyring.identify(request.scope["headers"])


def _may_see(tenant: Tenant, model: ModelAnswer) -> bool:
    """Whether a tenant may ask a model; what routes by meaning, anybody may."""
    return model.kind == "routed" or tenant.may_ask("base" if model.kind == "base" else model.id)


def _models(parts: Parts, tenant: Tenant) -> list[ModelAnswer]:
    table = parts.chooser.table
    if table is None:
        raise NoEngineError(
            "No routing table has come yet. Try again shortly; GET /ready tells when.",
            retry_after_s=parts.config.retry_after_s,
        )
    created = int(parts.started.timestamp())
    models = list_models(table, created, routed=parts.routing.status.state == "ready")
    return [model for model in models if _may_see(tenant, model)]


def _route_request(body: bytes) -> RouteRequest:
    try:
        return RouteRequest.model_validate(parse_object(body))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"][:1]) or None
        raise InvalidParameterError(
            f"The request cannot be read: {fault['msg'].removeprefix('Value error, ')}. Send "
            "{'input': a text or a list of texts} or {'messages': a chat}.",
            param=where,
        ) from None
