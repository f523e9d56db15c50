"""The real router and embedder inside the gateway."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from configs.manifest import BaseEntry
from configs.schema import RouterConfig
from expert_trainer.bundle import publish
from expert_trainer.errors import BundleError, NotPublishedError
from expert_trainer.storage import Storage
from router.conversation import Message
from router.embedder import load_embedder
from router.model import Router
from router.types import Route
from server.gateway import routing as module
from server.gateway.errors import RouterNotReadyError, UnavailableError, UnroutableTextError
from server.gateway.routing import LoadedRouter, Routing, router_from_bundle
from tests.server.gateway.conftest import (
    LAW,
    SPORT,
    House,
    StartGateway,
    chat,
    make_config,
    make_table,
    make_worker,
)

SPORTS = [
    f"The {team} {verb} the {event} after a {kind} match."
    for team in ("goalkeeper", "striker", "tennis player")
    for verb in ("won", "lost")
    for event in ("cup final", "league game", "tournament")
    for kind in ("close", "long")
]
LAWS = [
    f"The {body} {verb} the {matter} under {kind} law."
    for body in ("court", "judge", "tribunal")
    for verb in ("dismissed", "upheld")
    for matter in ("appeal", "contract claim", "injunction")
    for kind in ("civil", "criminal")
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published bundle with a router over two topics and no experts."""
    directory = tmp_path_factory.mktemp("routing")
    config = RouterConfig(clusters=2, abstain_quantile=0.1, device="cpu")
    embedder = load_embedder(
        config.embedder, device="cpu", batch_size=config.batch_size, max_tokens=config.max_tokens
    )
    vectors = embedder.encode(SPORTS[6:] + LAWS[6:])
    heldout = embedder.encode(SPORTS[:6] + LAWS[:6])
    router = Router.fit(vectors, heldout, config, seed=0, embedder=embedder).router
    router.save(directory / "router")
    publish(
        directory / "bundle",
        base=BaseEntry(name="base", model="base", digest="0" * 64),
        router_dir=directory / "router",
        clusters=2,
        experts=[],
        config_digest="0" * 64,
    )
    return directory / "bundle"


@pytest.fixture(scope="module")
def loaded(bundle: Path) -> LoadedRouter:
    config = make_config()
    at = config.bundle.model_copy(update={"path": str(bundle)})
    return router_from_bundle(config.model_copy(update={"bundle": at}))


def test_of_a_bundle_behind_a_url_the_router_alone_is_copied(
    bundle: Path, ftp_url: str, tmp_path: Path, loaded: LoadedRouter
) -> None:
    published = Storage(ftp_url)
    published.put_tree(bundle, "bundle", marker="manifest.json")
    published.write("bundle/experts/expert-0000/0123456789ab/card.json", b"{}")
    config = make_config()
    places = {"path": f"{ftp_url}/bundle", "scratch_dir": str(tmp_path / "scratch")}
    at = config.bundle.model_copy(update=places)
    copied = router_from_bundle(config.model_copy(update={"bundle": at}))
    assert copied.bundle == loaded.bundle
    assert copied.router.threshold == loaded.router.threshold
    copies = [path.parts for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    assert any("router" in parts for parts in copies)
    assert not any("experts" in parts for parts in copies)


class Fixed:
    """Sends everything to one expert, by the student unless the text is the unsure one."""

    threshold = 0.5

    def __init__(self, expert: str, unsure: str | None = None) -> None:
        self._expert, self._unsure = expert, unsure
        self.embedded: list[str] = []
        self.begun = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def quick_routes(self, conversations: Sequence[Sequence[Message]]) -> list[Route | None]:
        sure = Route(self._expert, 0, 0.9, 0.1, False, (), by="student")
        return [None if m[-1].text == self._unsure else sure for m in conversations]

    def route_conversations(self, conversations: Sequence[Sequence[Message]]) -> list[Route]:
        self.begun.set()
        assert self.gate.wait(60)
        self.embedded += [messages[-1].text for messages in conversations]
        return [Route(self._expert, 0, 0.9, 0.1, False, ()) for _ in conversations]


class Gated:
    """A real router that waits at a gate and counts its batches."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self.threshold = router.threshold
        self.batches: list[int] = []
        self.begun = threading.Event()
        self.gate = threading.Event()

    def quick_routes(self, conversations: Sequence[Sequence[Message]]) -> list[Route | None]:
        return [None] * len(conversations)

    def route_conversations(self, conversations: Sequence[Sequence[Message]]) -> list[Route]:
        self.batches.append(len(conversations))
        self.begun.set()
        assert self.gate.wait(60)
        return self._router.route_conversations(conversations)


@pytest.fixture
async def routing(loaded: LoadedRouter) -> AsyncIterator[Routing]:
    routing = Routing(lambda _: loaded, retry_after_s=3)
    routing.serve({loaded.bundle: ""})
    await until_settled(routing)
    try:
        yield routing
    finally:
        routing.close()


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(12_000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("did not happen within a minute")


async def until_settled(routing: Routing) -> None:
    """Until nothing is being loaded."""
    await until(lambda: all(s.state != "loading" for s in routing.states().values()))


async def test_requests_that_wait_are_embedded_together(loaded: LoadedRouter) -> None:
    assert isinstance(loaded.router, Router)
    gated = Gated(loaded.router)
    routing = Routing(lambda _: LoadedRouter(gated, loaded.bundle), retry_after_s=3)
    routing.serve({loaded.bundle: ""})
    texts = SPORTS[:12] + LAWS[:12]
    try:
        await until_settled(routing)
        first = asyncio.create_task(routing.route("completions", [{"prompt": texts[0]}]))
        assert await asyncio.to_thread(gated.begun.wait, 60)
        rest = [
            asyncio.create_task(routing.route("completions", [{"prompt": text}]))
            for text in texts[1:]
        ]
        await asyncio.sleep(0)  # now they wait
        gated.gate.set()
        routes = [(await task)[0] for task in [first, *rest]]
    finally:
        gated.gate.set()
        routing.close()
    assert gated.batches == [1, 23]
    alone = loaded.router.route(texts)
    assert [r.expert for r in routes] == [r.expert for r in alone]
    assert [r.score for r in routes] == pytest.approx([r.score for r in alone], abs=1e-4)
    assert len({route.expert for route in routes if route.expert}) == 2


async def test_the_state_is_told(routing: Routing, loaded: LoadedRouter) -> None:
    assert routing.status.state == "ready"
    assert routing.status.bundle == loaded.bundle
    assert routing.threshold == loaded.router.threshold
    assert routing.states() == {loaded.bundle: routing.status}
    fresh = Routing(lambda _: loaded, retry_after_s=3)
    assert fresh.status.state == "loading"
    with pytest.raises(RouterNotReadyError) as caught:
        await fresh.route("completions", [{"prompt": "a"}])
    assert caught.value.retry_after_s == 3
    fresh.close()


async def test_a_router_of_another_bundle_is_not_used(
    routing: Routing, loaded: LoadedRouter
) -> None:
    routing.serve({"0123456789ab": ""})
    await until_settled(routing)
    assert not routing.ready("0123456789ab")
    assert (routing.status.state, routing.status.bundle) == ("mismatched", loaded.bundle)
    with pytest.raises(RouterNotReadyError) as caught:
        await routing.route("completions", [{"prompt": SPORTS[0]}])
    for part in (loaded.bundle, "0123456789ab", "restart `introvert serve`"):
        assert part in caught.value.message
    routing.serve({loaded.bundle: ""})
    await until_settled(routing)
    assert await routing.route("completions", [{"prompt": SPORTS[0]}])


async def test_a_bundle_that_changes_while_a_text_is_routed(loaded: LoadedRouter) -> None:
    assert isinstance(loaded.router, Router)
    gated = Gated(loaded.router)
    routing = Routing(lambda _: LoadedRouter(gated, loaded.bundle), retry_after_s=3)
    routing.serve({loaded.bundle: ""})
    await until_settled(routing)
    asked = asyncio.create_task(routing.route("completions", [{"prompt": SPORTS[0]}]))
    await asyncio.to_thread(gated.begun.wait, 10)
    routing.serve({"0123456789ab": "elsewhere"})
    gated.gate.set()
    (route,) = await asked
    assert route.expert is not None
    with pytest.raises(RouterNotReadyError):
        await routing.route("completions", [{"prompt": SPORTS[0]}], bundle=loaded.bundle)
    routing.close()


async def test_each_bundle_is_routed_by_its_own_router(loaded: LoadedRouter) -> None:
    places: list[str] = []

    def source(place: str) -> LoadedRouter:
        places.append(place)
        return LoadedRouter(Fixed(place or "first"), {"": "aaa", "next": "bbb"}[place])

    routing = Routing(source, retry_after_s=3)
    routing.serve({"aaa": ""})
    await until_settled(routing)
    routing.serve({"aaa": "", "bbb": "next"})
    assert routing.ready("aaa")
    assert not routing.ready("bbb")
    await until_settled(routing)
    assert routing.status == routing.states()["aaa"]
    asked = [
        routing.route("completions", [{"prompt": "a"}], bundle=b) for b in (None, "aaa", "bbb")
    ]
    routes = [routes[0] for routes in await asyncio.gather(*asked)]
    assert [route.expert for route in routes] == ["first", "first", "next"]
    assert {route.by for route in routes} == {"student"}
    assert routing.threshold_of("bbb") == routing.threshold
    routing.serve({"bbb": "next"})
    assert (routing.threshold_of("aaa"), routing.threshold_of(None)) == (None, None)
    assert places == ["", "next"]
    assert list(routing.states()) == ["bbb"]
    routing.close()


async def test_what_the_student_is_not_sure_of_waits_for_the_embedder_alone() -> None:
    fixed = Fixed("sure", unsure="hm")
    routing = Routing(lambda _: LoadedRouter(fixed, "aaa"), retry_after_s=3)
    routing.serve({"aaa": ""})
    await until_settled(routing)
    prompts = [{"prompt": text} for text in ("a", "hm", "b")]
    routes = await routing.route("completions", prompts)
    assert [route.by for route in routes] == ["student", "embedder", "student"]
    assert fixed.embedded == ["hm"]
    routing.close()


async def test_a_queue_that_is_full_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.gateway.routing.WAITING_REQUESTS", 2)
    fixed = Fixed("sure", unsure="hm")
    fixed.gate.clear()
    routing = Routing(lambda _: LoadedRouter(fixed, "aaa"), retry_after_s=3)
    routing.serve({"aaa": ""})
    try:
        await until_settled(routing)
        first = asyncio.create_task(routing.route("completions", [{"prompt": "hm"}]))
        assert await asyncio.to_thread(fixed.begun.wait, 60)
        waiting = [
            asyncio.create_task(routing.route("completions", [{"prompt": "hm"}])) for _ in range(2)
        ]
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError) as caught:
            await routing.route("completions", [{"prompt": "hm"}])
        assert caught.value.retry_after_s == 3
        assert await routing.route("completions", [{"prompt": "sure of it"}])
        fixed.gate.set()
        assert all(await asyncio.gather(first, *waiting))
    finally:
        fixed.gate.set()
        routing.close()


async def test_a_router_that_cannot_be_loaded_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.gateway.routing.RETRY_FIRST_S", 0.01)
    failures = [BundleError("away"), OSError("odd")]

    def source(place: str) -> LoadedRouter:
        if failures:
            raise failures.pop(0)
        return LoadedRouter(Fixed("sure"), "aaa")

    routing = Routing(source, retry_after_s=3)
    routing.serve({"aaa": ""})
    await until(lambda: routing.ready("aaa"))
    assert not failures
    routing.close()


async def test_one_bad_request_spoils_no_batch(routing: Routing) -> None:
    good, bad = await asyncio.gather(
        routing.route("completions", [{"prompt": SPORTS[0]}]),
        routing.route("completions", [{"prompt": " "}]),
        return_exceptions=True,
    )
    assert not isinstance(good, BaseException)
    assert isinstance(bad, UnroutableTextError)
    assert bad.param == "prompt"


async def test_a_huge_text_holds_nobody_up(routing: Routing) -> None:
    text = LAWS[0] + " of the law" * 500_000
    async with asyncio.timeout(60):
        ((huge,), (small,)) = await asyncio.gather(
            routing.route("completions", [{"prompt": text}]),
            routing.route("completions", [{"prompt": LAWS[0]}]),
        )
    assert huge.cluster == small.cluster


async def test_from_text_to_the_right_engine(
    house: House, start_gateway: StartGateway, loaded: LoadedRouter
) -> None:
    sport, law = make_worker(0, house.sport.url, [SPORT]), make_worker(1, house.law.url, [LAW])
    table = make_table(1, sport, law, bundle=loaded.bundle)
    gateway = await start_gateway(table, router=lambda _: loaded)
    await gateway.until("/ready", lambda answer: answer["router"] == "ready")
    for texts in (SPORTS, LAWS):
        _, explained, _ = await gateway.post("/v1/route", {"input": texts[7]})
        (route,) = explained["data"]
        assert not route["abstained"]
        _, answer, headers = await gateway.post("/v1/chat/completions", chat("introvert", texts[7]))
        assert answer["model"] == route["model"]
        assert headers["x-introvert-expert"] == route["expert"]
        assert float(headers["x-introvert-route-score"]) == pytest.approx(route["score"], abs=1e-3)
    assert house.sport.seen
    assert house.law.seen
    _, answer, headers = await gateway.post(
        "/v1/chat/completions", chat("introvert", "xkcd qwerty 0x7f zzz")
    )
    assert headers["x-introvert-expert"] == "base"


class Slow:
    """A source of a router that comes when it is let."""

    def __init__(self, loaded: LoadedRouter | None) -> None:
        self.loaded = loaded
        self.comes = threading.Event()

    def __call__(self, place: str) -> LoadedRouter:
        assert self.comes.wait(60)
        if self.loaded is None:
            raise NotPublishedError("it is not there")
        return self.loaded


async def test_texts_wait_for_a_router_that_is_being_loaded(loaded: LoadedRouter) -> None:
    source = Slow(loaded)
    routing = Routing(source, retry_after_s=3, patience_s=60)
    try:
        routing.serve({loaded.bundle: ""})
        asked = asyncio.create_task(routing.route("completions", [{"prompt": SPORTS[0]}]))
        await asyncio.sleep(0)
        source.comes.set()
        (route,) = await asked
        assert route.expert is not None
    finally:
        source.comes.set()
        routing.close()


async def test_texts_do_not_wait_for_a_router_that_cannot_be_loaded() -> None:
    source = Slow(None)
    routing = Routing(source, retry_after_s=3, patience_s=3600)
    try:
        routing.serve({"aaa": ""})
        waiting = asyncio.create_task(routing.route("completions", [{"prompt": "a"}]))
        await asyncio.sleep(0)
        source.comes.set()
        for asked in (waiting, routing.route("completions", [{"prompt": "a"}])):
            with pytest.raises(RouterNotReadyError, match="it is not there"):
                await asked
    finally:
        source.comes.set()
        routing.close()


async def test_texts_wait_for_a_router_only_so_long_and_only_so_many(
    loaded: LoadedRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Slow(loaded)
    routing = Routing(source, retry_after_s=3, patience_s=0.05)
    try:
        routing.serve({loaded.bundle: ""})
        with pytest.raises(RouterNotReadyError):
            await routing.route("completions", [{"prompt": "a"}])
        monkeypatch.setattr(module, "WAITING_REQUESTS", 0)
        monkeypatch.setattr(routing, "_patience_s", 3600)
        with pytest.raises(RouterNotReadyError):
            await routing.route("completions", [{"prompt": "a"}])
    finally:
        source.comes.set()
        routing.close()
