"""The gateway's own answers: their schemas, and how they are made from the table and a route.

Everything that an engine answers is passed on as it is and has no schema here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from router.types import Candidate, Decider, Route
from server.gateway.readiness import Readiness
from server.gateway.views import View
from server.table import ROUTED_MODEL, RoutingTable


class Answer(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class ErrorFields(Answer):
    """What went wrong, and what to do next."""

    message: str
    type: str
    param: str | None
    """The field at fault, where there is one."""
    code: str
    """Stable: programs may rely on it."""


class ErrorAnswer(Answer):
    """An error in OpenAI's shape."""

    error: ErrorFields


class AnthropicErrorFields(Answer):
    """What went wrong, and what to do next."""

    type: str
    message: str
    code: str
    """Stable: programs may rely on it."""


class AnthropicErrorAnswer(Answer):
    """An error in Anthropic's shape."""

    type: Literal["error"]
    error: AnthropicErrorFields


class ModelAnswer(Answer):
    """One model name, in OpenAI's shape and with what this system adds."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """When this gateway started, seconds since the epoch."""
    owned_by: Literal["introvert"] = "introvert"
    kind: Literal["routed", "base", "expert"]
    version: str | None = None
    """Content hash of an expert."""
    served_name: str | None = None
    """The name in the body of answers; none for `introvert`, which many answer for."""
    cluster: int | None = None
    ready: bool
    """Whether a ready worker can answer for it now."""
    workers: list[str]
    """Workers that can."""


class ModelList(Answer):
    """All model names."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


MAX_TEXTS = 256
"""Texts in one request to explain: they are routed while others wait."""


class RouteRequest(Answer):
    """What to explain: texts, or one chat."""

    model_config = ConfigDict(extra="forbid")

    input: str | Annotated[list[str], Field(max_length=MAX_TEXTS)] | None = None
    """A text, or several, each routed by itself."""
    messages: list[dict[str, Any]] | None = None
    """A chat, routed as /v1/chat/completions would."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise ValueError("give 'input' or 'messages', one of the two")
        return self


class RouteCandidate(Answer):
    """One expert that might have been chosen."""

    expert: str
    score: float
    """Cosine of the text and the expert's centroid."""
    served: bool
    """Whether the routing table has the expert and its workers have not refused it; if not, the
    base answers in its place."""
    allowed: bool
    """Whether the API key may ask it."""
    workers: list[str]
    """Ready workers that hold it."""


class RouteExplanation(Answer):
    """Where one text goes, and why."""

    expert: str | None
    """The expert that would answer the API key; none: the base."""
    model: str
    """The name that the answer's `model` would have."""
    cluster: int
    score: float
    margin: float
    """Score less the runner-up's."""
    abstained: bool
    """Whether the score is below the threshold, so that the base answers."""
    allowed: bool
    """Whether the API key would get an answer: false where it may ask no candidate and not the
    base either."""
    threshold: float | None
    """Score below which the router abstains."""
    by: Decider
    """What decided: `student`, whose scores are estimates, or `embedder`."""
    workers: list[str]
    """Ready workers that could answer."""
    candidates: list[RouteCandidate]
    """The best candidates, falling by score."""


class RouteList(Answer):
    """One explanation per text."""

    object: Literal["list"] = "list"
    data: list[RouteExplanation]


class Health(Answer):
    """The process is alive."""

    status: Literal["ok"] = "ok"


RouterState = Literal["loading", "ready", "failed", "mismatched"]
"""`mismatched`: the router is of another bundle than the routing table."""


class ReadyAnswer(Answer):
    """Whether the gateway can answer, and what is missing."""

    ready: bool
    degraded: bool
    """Whether something that belongs to the service cannot answer now."""
    experts_ready: int
    experts_total: int
    workers_ready: int
    workers_total: int
    missing: list[str]
    """Served names of the experts that no ready worker holds."""
    router: RouterState
    detail: str
    """Why it is not ready or degraded, in one sentence; empty when all is well."""


class RouterStatus(Answer):
    """The router of this gateway."""

    state: RouterState
    bundle: str | None
    """Version of the bundle it was loaded from."""
    detail: str
    """Why it is not ready; empty when it is."""


def list_models(table: RoutingTable, created: int, *, routed: bool) -> list[ModelAnswer]:
    """Every model name: `introvert`, the base, and each expert's id.

    Args:
        table: the routing table in use.
        created: seconds since the epoch.
        routed: whether the router is loaded.
    """
    everyone = [worker.id for worker in table.ready_workers(None)]
    holders: dict[str, list[str]] = {}
    for worker in table.ready_workers(None):
        for name in worker.experts:
            holders.setdefault(name, []).append(worker.id)
    models = [
        ModelAnswer(
            id=ROUTED_MODEL,
            created=created,
            kind="routed",
            ready=routed and bool(everyone),
            workers=everyone,
        ),
        ModelAnswer(
            id=table.base_name,
            created=created,
            kind="base",
            served_name=table.base_name,
            ready=bool(everyone),
            workers=everyone,
        ),
    ]
    for expert in table.experts:
        workers = holders.get(expert.served_name, [])
        models.append(
            ModelAnswer(
                id=expert.id,
                created=created,
                kind="expert",
                version=expert.version,
                served_name=expert.served_name,
                cluster=expert.cluster,
                ready=bool(workers),
                workers=workers,
            )
        )
    return models


def explain_route(
    route: Route, view: View, threshold: float | None, may_ask: Callable[[str], bool]
) -> RouteExplanation:
    """A route in words, with the homes that could answer now.

    Args:
        route: what is to be explained.
        view: the bundle that it is of.
        threshold: score below which that bundle's router abstains.
        may_ask: whether the API key may ask an expert, by its id, or `base`.
    """
    allowed = view.allowed(route, may_ask)
    target = allowed or view.routed(route.expert)
    return RouteExplanation(
        expert=target.expert,
        model=target.served_name,
        cluster=route.cluster,
        score=route.score,
        margin=route.margin,
        abstained=route.abstained,
        allowed=allowed is not None,
        threshold=threshold,
        by=route.by,
        workers=[home.worker for home in target.homes],
        candidates=[_explain(candidate, view, may_ask) for candidate in route.top],
    )


def _explain(candidate: Candidate, view: View, may_ask: Callable[[str], bool]) -> RouteCandidate:
    home = view.routed(candidate.expert)
    served = home.expert == candidate.expert
    return RouteCandidate(
        expert=candidate.expert,
        score=candidate.score,
        served=served,
        allowed=may_ask(candidate.expert),
        workers=[h.worker for h in home.homes] if served else [],
    )


def report_ready(readiness: Readiness, router: RouterStatus) -> ReadyAnswer:
    """Whether the gateway can answer, with the reason where it cannot."""
    now = readiness.coverage
    reasons = []
    if now.workers_ready == 0:
        reasons.append("no worker is ready")
    if now.missing:
        reasons.append(f"{len(now.missing)} of {now.experts_total} experts have no ready worker")
    if now.refused:
        reasons.append(f"{len(now.refused)} of these were refused by their workers")
    if now.workers_ready and now.workers_ready < now.workers_total:
        reasons.append(f"{now.workers_total - now.workers_ready} workers are not ready")
    if router.state != "ready":
        reasons.append(router.detail)
    return ReadyAnswer(
        ready=readiness.was_complete and now.workers_ready > 0 and router.state == "ready",
        degraded=readiness.degraded or router.state != "ready",
        experts_ready=now.experts_ready,
        experts_total=now.experts_total,
        workers_ready=now.workers_ready,
        workers_total=now.workers_total,
        missing=list(now.missing),
        router=router.state,
        detail="; ".join(reasons),
    )
