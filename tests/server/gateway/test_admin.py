"""The admin routes, in front of a control plane that answers as agreed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from server.gateway.app import create_app
from server.gateway.routing import LoadedRouter
from server.gateway.seat import Seat
from server.keys import digest_of
from server.sockets import listen_at
from server.table import CONTROL_SOCKET
from tests.server.gateway.conftest import (
    SPORT,
    FakeRouter,
    FakeTables,
    make_config,
    make_table,
    make_worker,
    serving,
)

KEY = {"authorization": "Bearer secret"}
DIGEST = digest_of("secret").hex()
CHANGE = {
    "bundle": "dddddddddddd",
    "place": "/bundles/next",
    "state": "loading",
    "share": None,
    "verified": 1,
    "total": 2,
    "refused": {},
    "detail": "",
    "took_s": None,
}


class Control:
    """A control plane that notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Any]] = []

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.asked.append((request.method, request.path, json.loads(body) if body else None))
        if request.method == "GET":
            current = {"bundle": "cccccccccccc", "place": "/bundles/now"}
            return web.json_response({"current": current, "change": CHANGE})
        if request.path == "/bundle/abort":
            error = {"message": "no change", "type": "x", "param": None, "code": "no_change"}
            return web.json_response({"error": error}, status=409)
        return web.json_response(CHANGE, status=202)


@contextlib.asynccontextmanager
async def control_plane(run_dir: Path) -> AsyncIterator[Control]:
    control = Control()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", control.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.SockSite(runner, listen_at(run_dir / CONTROL_SOCKET)).start()
        yield control
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def gateway(
    seat: Seat, *, inside: bool = False, place: str = "", **options: Any
) -> AsyncIterator[str]:
    """A gateway with one worker; `inside`: as on its Unix socket."""
    worker = make_worker(0, "http://127.0.0.1:9", [SPORT])
    tables = FakeTables(make_table(1, worker, place=place))
    source = LoadedRouter(FakeRouter(), "cccccccccccc")
    app = create_app(make_config(**options), tables, lambda _place: source, seat)
    async with serving(app.state.internal if inside else app) as url:
        yield url


async def ask(
    url: str, method: str, path: str, body: Any = None, headers: Any = None
) -> tuple[int, Any, Any]:
    async with (
        aiohttp.ClientSession() as http,
        http.request(method, url + path, json=body, headers=headers) as answer,
    ):
        return answer.status, await answer.json(), answer.headers


async def test_the_change_of_a_bundle_is_passed_on(tmp_path: Path) -> None:
    async with (
        control_plane(tmp_path) as control,
        gateway(Seat(tmp_path, admin_sha256=DIGEST)) as url,
    ):
        body = {"path": "/bundles/next", "canary": 0.25}
        status, answer, _ = await ask(url, "POST", "/admin/bundle", body, KEY)
        assert (status, answer) == (202, CHANGE)
        status, answer, _ = await ask(url, "GET", "/admin/bundle")
        assert (status, answer["change"]) == (200, CHANGE)
        status, _, _ = await ask(url, "POST", "/admin/bundle/promote", headers=KEY)
        assert status == 202
        status, answer, _ = await ask(url, "POST", "/admin/bundle/abort", headers=KEY)
        assert (status, answer["error"]["code"]) == (409, "no_change")
        assert control.asked == [
            ("POST", "/bundle", body),
            ("GET", "/bundle", None),
            ("POST", "/bundle/promote", None),
            ("POST", "/bundle/abort", None),
        ]
        _, answer, _ = await ask(url, "GET", "/admin/status")
        assert answer["change"] == CHANGE


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "path"),
        ({"path": ""}, "path"),
        ({"path": "x", "canary": 1}, "canary"),
        ({"p": 1}, "path"),
    ],
)
async def test_what_is_no_change_reaches_nobody(tmp_path: Path, body: Any, param: str) -> None:
    async with (
        control_plane(tmp_path) as control,
        gateway(Seat(tmp_path, admin_sha256=DIGEST)) as url,
    ):
        status, answer, _ = await ask(url, "POST", "/admin/bundle", body, KEY)
        assert (status, answer["error"]["param"]) == (400, param)
        assert control.asked == []


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer other"}, {"x-api-key": DIGEST}])
async def test_changes_need_the_admin_key(tmp_path: Path, headers: Any) -> None:
    async with (
        control_plane(tmp_path) as control,
        gateway(Seat(tmp_path, admin_sha256=DIGEST)) as url,
    ):
        for path in ("/admin/bundle", "/admin/bundle/promote", "/admin/bundle/abort"):
            status, answer, got = await ask(url, "POST", path, {"path": "x"}, headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert "www-authenticate" in got
        assert control.asked == []
        assert (await ask(url, "GET", "/admin/status"))[0] == 200, "no key is configured"


async def test_with_a_configured_key_looking_needs_it_too(tmp_path: Path) -> None:
    async with gateway(Seat(), admin_key_sha256=DIGEST) as url:
        for path in ("/admin/status", "/admin/bundle"):
            assert (await ask(url, "GET", path))[0] == 401
        assert (await ask(url, "GET", "/admin/status", headers=KEY))[0] == 200
    async with gateway(Seat(tmp_path), inside=True, admin_key_sha256=DIGEST) as url:
        assert (await ask(url, "GET", "/admin/status"))[0] == 200


async def test_without_any_key_nothing_can_be_changed() -> None:
    async with gateway(Seat()) as url:
        status, answer, _ = await ask(url, "POST", "/admin/bundle", {"path": "x"}, KEY)
        assert status == 401
        assert "no admin key" in answer["error"]["message"]


async def test_a_bundles_password_is_not_shown() -> None:
    async with gateway(Seat(), place="ftp://ann:open-sesame@files/bundle") as url:
        table = None
        while table is None:
            table = (await ask(url, "GET", "/admin/status"))[1]["table"]
        assert table["place"] == "ftp://ann:***@files/bundle"


async def test_a_dead_control_plane_is_told(tmp_path: Path) -> None:
    async with gateway(Seat(tmp_path, admin_sha256=DIGEST)) as url:
        status, answer, headers = await ask(url, "POST", "/admin/bundle", {"path": "x"}, KEY)
        assert (status, answer["error"]["code"]) == (503, "control_plane_down")
        assert headers["retry-after"] == "1"
        status, answer, _ = await ask(url, "GET", "/admin/status")
        assert (status, answer["change"]) == (200, None)


async def test_api_keys_at_the_own_routes(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"- name: alice\n  sha256: {DIGEST}\n  experts: [expert-0001]\n")
    async with gateway(Seat(), keys_file=str(keys)) as url:
        for path in ("/v1/models", "/v1/models/expert-0001"):
            assert (await ask(url, "GET", path))[0] == 401
        assert (await ask(url, "POST", "/v1/route", {"input": "law"}))[0] == 401
        for open_to_all in ("/health", "/admin/status"):
            assert (await ask(url, "GET", open_to_all))[0] == 200
        _, models, _ = await ask(url, "GET", "/v1/models", headers=KEY)
        assert [model["id"] for model in models["data"]] == ["introvert", "expert-0001"]
        status, answer, _ = await ask(url, "GET", "/v1/models/expert-0000", headers=KEY)
        assert (status, answer["error"]["code"]) == (403, "model_not_allowed")
