"""The OpenAPI document against the application: whatever is asked, what comes is as documented.

Requests are made from the document, right and wrong ones, and sent to the real application over a
real socket, before fake engines that answer everything. Derandomised: every run sends the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest
import schemathesis
from fastapi import FastAPI
from schemathesis.checks import CHECKS, load_all_checks

from server.gateway.app import create_app
from server.gateway.routing import LoadedRouter
from server.keys import digest_of
from tests.server.gateway.conftest import (
    BASE,
    LAW,
    SPORT,
    FakeEngine,
    FakeRouter,
    FakeTables,
    make_config,
    make_table,
    make_worker,
    serving,
)

DOCUMENTED_FAILURES = (503, 504)
"""No worker, no router, an engine's silence: nothing that a request alone could bring about."""
EXAMPLES = 40
"""Requests made at random for each operation, besides those that cover the document's cases."""
MODELS = ("introvert", BASE, "expert-0000", LAW, None, None)
"""What becomes of a model name made at random, which nobody serves; none: it stays."""
ADMIN_KEY = "the admin's own"

load_all_checks()
CHECKED = [
    CHECKS.get_one(name)
    for name in (
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "unsupported_method",
    )
]


def make_app(*engines: FakeEngine, scratch: Path | None = None) -> FastAPI:
    experts = [[SPORT], [LAW]]
    workers = [make_worker(i, engine.url, experts[i]) for i, engine in enumerate(engines)]
    table = make_table(1, *workers)
    config = make_config(scratch, admin_key_sha256=digest_of(ADMIN_KEY).hex())
    return create_app(config, FakeTables(table), _load_router)


def _load_router(*_: object) -> LoadedRouter:
    return LoadedRouter(router=FakeRouter(), bundle="cccccccccccc")


@contextlib.asynccontextmanager
async def house(scratch: Path) -> AsyncIterator[str]:
    """URL of a gateway before two fake engines."""
    async with contextlib.AsyncExitStack() as stack:
        engines = []
        for name in ("sport", "law"):
            engines.append(await FakeEngine(name=name).start())
            stack.push_async_callback(engines[-1].stop)
        yield await stack.enter_async_context(serving(make_app(*engines, scratch=scratch)))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The house in a thread of its own: the client here is a blocking one."""
    found: list[str] = []
    up, over = threading.Event(), threading.Event()

    async def live() -> None:
        async with house(tmp_path_factory.mktemp("scratch")) as address:
            found.append(address)
            up.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(live()), daemon=True)
    thread.start()
    try:
        assert up.wait(60)
        yield found[0]
    finally:
        over.set()
        thread.join(60)


def name_known_model(case: schemathesis.Case) -> None:
    """Where the case names a model, mostly one that there is; which depends on the case alone."""
    for fields in (case.body, case.path_parameters):
        if isinstance(fields, dict) and isinstance(fields.get("model"), str):
            turn = zlib.crc32(json.dumps(fields, sort_keys=True).encode()) % len(MODELS)
            fields["model"] = MODELS[turn] or fields["model"]


document = schemathesis.openapi.from_dict(make_app().openapi())


@document.parametrize()
@hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
def test_answers_are_as_documented(case: schemathesis.Case, url: str) -> None:
    name_known_model(case)
    key = {"authorization": f"Bearer {ADMIN_KEY}"}
    response = case.call(base_url=url, headers=key, timeout=60)
    case.validate_response(response, checks=CHECKED)
    assert response.status_code < 500 or response.status_code in DOCUMENTED_FAILURES
