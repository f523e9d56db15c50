from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.manifest import FileEntry, Fingerprint
from configs.schema import ServingConfig
from expert_trainer.hashed import HashedDirectory
from expert_trainer.storage import Storage
from server import adapter_files
from server import adapters as module
from server.adapter_files import modules_of
from server.adapters import DEADLY, Adapters
from server.engine import Adapter, Room, room_for
from server.errors import EngineCallError

RIGHT, WRONG = [-1.0], [-3.0]
ROOM = Room(slots=2, host_slots=8, rank=8)


class Engine:
    """Holds adapters in memory; as vLLM it refuses to load one twice or to unload one it lacks."""

    def __init__(self) -> None:
        self.loaded: dict[str, Adapter] = {}
        self.calls: list[str] = []
        self.swapped: set[str] = set()
        """Names whose weights answer as others do."""
        self.stuck: set[str] = set()
        """Names that cannot be unloaded."""
        self.deadly: set[str] = set()
        """Names whose loading ends the engine."""
        self.lost_answers = 0
        """Loads that are carried out though no answer comes."""
        self.called = asyncio.Event()
        self.died = asyncio.Event()
        self.pause: asyncio.Event | None = None

    async def healthy(self, timeout_s: float) -> bool:
        return not self.died.is_set()

    async def load(self, adapter: Adapter) -> None:
        name = adapter.served_name
        await self._begin(f"load {name}")
        if name in self.deadly:
            self.died.set()
        if self.died.is_set():
            raise EngineCallError("the engine core is gone", 500)
        if name in self.loaded:
            raise EngineCallError("has already been loaded", 400)
        self.loaded[name] = adapter
        if self.lost_answers:
            self.lost_answers -= 1
            raise EngineCallError("no answer from the engine")

    async def unload(self, served_name: str) -> None:
        await self._begin(f"unload {served_name}")
        if self.died.is_set() or served_name in self.stuck:
            raise EngineCallError("it will not go", 500)
        self.loaded.pop(served_name, None)

    async def generate(self, model: str) -> None:
        await self.probe(model, [])

    async def probe(self, model: str, token_ids: Sequence[int]) -> list[float]:
        await asyncio.sleep(0)
        if self.died.is_set():
            raise EngineCallError("the engine core is gone", 500)
        if model not in self.loaded:
            raise EngineCallError("does not exist", 404)
        return WRONG if model in self.swapped else RIGHT

    async def _begin(self, call: str) -> None:
        self.calls.append(call)
        self.called.set()
        await asyncio.sleep(0)
        if self.pause:
            await self.pause.wait()


def adapter(root: Path, name: str, *, rank: int = 4) -> Adapter:
    directory = root / name
    directory.mkdir(parents=True, exist_ok=True)
    content = name.encode()
    (directory / "weights.safetensors").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    files = (FileEntry(path="weights.safetensors", sha256=digest, bytes=len(content)),)
    return Adapter(
        name,
        str(directory),
        rank,
        Fingerprint(token_ids=[1, 2], logprobs=RIGHT),
        HashedDirectory(Storage(directory), files),
    )


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_PAUSE_S", 0.0)
    monkeypatch.setattr(module, "RETRY_UNLOAD_S", 0.0)


def begun(*wanted: Adapter, room: Room | None = ROOM) -> Adapters:
    adapters = Adapters(wanted, ServingConfig())
    adapters.begin(room)
    return adapters


async def test_what_is_new_is_loaded_before_what_is_gone_is_unloaded(tmp_path: Path) -> None:
    a, b, c = (adapter(tmp_path, name) for name in "abc")
    adapters, engine = begun(a, b), Engine()
    await adapters.settle(engine)
    assert adapters.verified == ["a", "b"]
    adapters.want([c, b])
    assert adapters.verified == ["b", "a"], "a answers until it is taken out"
    await adapters.settle(engine)
    assert adapters.verified == ["c", "b"]
    assert engine.calls == ["load a", "load b", "load c", "unload a"]
    assert adapters.detail == ""


async def test_the_latest_wish_wins_while_an_expert_is_being_loaded(tmp_path: Path) -> None:
    a, b, c = (adapter(tmp_path, name) for name in "abc")
    adapters, engine = begun(a, b), Engine()
    engine.pause = asyncio.Event()
    settling = asyncio.create_task(adapters.settle(engine))
    try:
        await engine.called.wait()
        adapters.want([c])
        engine.pause.set()
        await settling
    finally:
        settling.cancel()
    assert engine.calls == ["load a", "load c", "unload a"]
    assert adapters.verified == ["c"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: (d / "weights.safetensors").write_bytes(b""), "has 0 bytes where 1 were"),
        (lambda d: (d / "weights.safetensors").write_bytes(b"x"), "was changed after it had been"),
        (lambda d: (d / "weights.safetensors").unlink(), "is missing"),
        (lambda d: (d / "more.json").write_text("{}"), "is not listed in the manifest"),
        (lambda d: (d / "adapter_model.bin").write_text(""), "neither safetensors nor JSON"),
        (lambda d: d.rename(d.with_name("elsewhere")), "is gone"),
    ],
)
async def test_files_that_are_not_as_published_never_reach_the_engine(
    tmp_path: Path, damage: object, reason: str
) -> None:
    a, b = adapter(tmp_path, "a"), adapter(tmp_path, "b")
    damage(Path(a.path))  # type: ignore[operator]
    adapters, engine = begun(a, b), Engine()
    await adapters.settle(engine)
    assert adapters.verified == ["b"]
    assert reason in adapters.refused["a"]
    assert adapters.detail == f"a refused: {adapters.refused['a']}"
    assert engine.calls == ["load b"]


async def test_a_rank_above_the_engines_is_refused_with_the_remedy(tmp_path: Path) -> None:
    adapters, engine = begun(adapter(tmp_path, "a", rank=16)), Engine()
    await adapters.settle(engine)
    assert "its rank is 16" in adapters.refused["a"]
    assert "serving.max_rank=16" in adapters.refused["a"]
    assert engine.calls == []


async def test_an_expert_that_changes_other_layers_than_the_engine_foresees_is_refused(
    tmp_path: Path,
) -> None:
    from safetensors.numpy import save_file

    def changing(name: str, *layers: str) -> Adapter:
        made = adapter(tmp_path, name)
        keys = [f"base_model.model.model.layers.0.{layer}.lora_A.weight" for layer in layers]
        tensors = {key: np.zeros((1, 1), np.float32) for key in keys}
        save_file(tensors, Path(made.path) / "weights.safetensors")
        return dataclasses.replace(made, source=None)

    a, b = changing("a", "self_attn.q_proj", "mlp.up_proj"), changing("b", "lm_head")
    modules = await modules_of([a, adapter(tmp_path, "c")])
    assert modules == {"q_proj", "up_proj"}
    adapters, engine = begun(a, b, room=room_for([a], ServingConfig(), modules)), Engine()
    await adapters.settle(engine)
    assert adapters.verified == ["a"]
    assert "it changes layers (lm_head)" in adapters.refused["b"]


async def test_a_refused_expert_is_tried_again_once_it_was_dropped(tmp_path: Path) -> None:
    a, b = adapter(tmp_path, "a"), adapter(tmp_path, "b")
    adapters, engine = begun(a), Engine()
    engine.swapped = {"a"}
    await adapters.settle(engine)
    assert "does not answer as it did" in adapters.refused["a"]
    assert "a" not in engine.loaded
    engine.swapped = set()
    for wish in ([a, b], [b], [a, b]):
        adapters.want(wish)
        await adapters.settle(engine)
    assert engine.calls == ["load a", "unload a", "load b", "load a"]
    assert (adapters.verified, adapters.refused) == (["a", "b"], {})


async def test_an_answer_that_got_lost_costs_a_second_try(tmp_path: Path) -> None:
    adapters, engine = begun(adapter(tmp_path, "a")), Engine()
    engine.lost_answers = 1
    await adapters.settle(engine)
    assert adapters.verified == ["a"]
    assert engine.calls == ["load a", "unload a", "load a"]


async def test_what_cannot_be_unloaded_is_listed_no_more_and_tried_again(tmp_path: Path) -> None:
    adapters, engine = begun(adapter(tmp_path, "a")), Engine()
    await adapters.settle(engine)
    engine.stuck = {"a"}
    adapters.want([])
    await adapters.settle(engine)
    assert adapters.verified == []
    assert adapters.detail == "a cannot be unloaded: it will not go"
    engine.stuck = set()
    await adapters.changed()
    await adapters.settle(engine)
    assert (engine.loaded, adapters.detail) == ({}, "")


async def test_what_is_refused_and_cannot_be_unloaded_is_taken_out_later(tmp_path: Path) -> None:
    adapters, engine = begun(adapter(tmp_path, "a")), Engine()
    engine.swapped = engine.stuck = {"a"}
    await adapters.settle(engine)
    assert list(adapters.refused) == list(engine.loaded) == ["a"]
    engine.stuck = set()
    await adapters.changed()
    await adapters.settle(engine)
    assert (list(adapters.refused), engine.loaded) == (["a"], {})


async def test_an_expert_that_takes_engines_along_is_tried_last_and_then_refused(
    tmp_path: Path,
) -> None:
    a, b = adapter(tmp_path, "a"), adapter(tmp_path, "b")
    adapters = Adapters([a, b], ServingConfig())
    for life in range(DEADLY):
        adapters.begin(ROOM)
        engine = Engine()
        engine.deadly = {"a"}
        settling = asyncio.create_task(adapters.settle(engine))
        await engine.died.wait()
        settling.cancel()
        await asyncio.gather(settling, return_exceptions=True)
        assert adapters.verified == ([] if life == 0 else ["b"])
        assert adapters.refused == {}
    adapters.begin(ROOM)
    engine = Engine()
    await adapters.settle(engine)
    assert engine.calls == ["load b"]
    assert adapters.refused == {
        "a": f"{DEADLY} engines ended while it was being loaded; the engine's log tells why"
    }


async def test_an_engine_without_room_does_not_fit_once_there_are_experts(tmp_path: Path) -> None:
    adapters = begun(room=None)
    await adapters.settle(Engine())
    assert adapters.fits
    adapters.want([adapter(tmp_path, "a")])
    assert not adapters.fits


NAMES = "abcdef"
WISHES = st.lists(st.sampled_from(NAMES), unique=True)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("want"), WISHES),
        st.tuples(st.just("turns"), st.integers(0, 30)),
        st.tuples(st.just("die"), st.just(0)),
        st.tuples(st.just("lose answers"), st.integers(1, 4)),
        st.tuples(st.just("stick"), WISHES),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(first=WISHES, steps=STEPS, swapped=WISHES, damaged=WISHES)
def test_in_the_end_the_engine_holds_what_is_wanted_but_for_what_was_refused(
    first: list[str], steps: list[tuple[str, object]], swapped: list[str], damaged: list[str]
) -> None:
    with TemporaryDirectory() as directory:
        everything = {name: adapter(Path(directory), name) for name in NAMES}
        for name in damaged:
            (Path(directory) / name / "weights.safetensors").write_bytes(b"something else")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "fault_of", _fault_at_once)  # a thread would end when it likes
            asyncio.run(_course(everything, first, steps, set(swapped), set(damaged)))


async def _fault_at_once(adapter: Adapter) -> str | None:
    await asyncio.sleep(0)
    return adapter_files._fault(adapter)


async def _course(
    everything: dict[str, Adapter],
    first: list[str],
    steps: list[tuple[str, object]],
    swapped: set[str],
    damaged: set[str],
) -> None:
    """Live through `steps`, some of them while the engine is being settled, and look at the end."""

    async def follow(engine: Engine) -> None:
        while True:
            await adapters.settle(engine)
            await adapters._changed.wait()

    def start() -> tuple[Engine, asyncio.Task[None]]:
        engine = Engine()
        engine.swapped = swapped
        adapters.begin(room_for(list(everything.values()), ServingConfig()))
        return engine, asyncio.create_task(follow(engine))

    adapters = Adapters([everything[name] for name in first], ServingConfig())
    engine, life = start()
    wanted = first
    for step, value in steps:
        if step == "want":
            wanted = list(value)  # type: ignore[call-overload]
            adapters.want([everything[name] for name in wanted])
        elif step == "turns":
            for _ in range(value):  # type: ignore[call-overload]
                await asyncio.sleep(0)
        elif step == "lose answers":
            engine.lost_answers = value  # type: ignore[assignment]
        elif step == "stick":
            engine.stuck = set(value)  # type: ignore[call-overload]
        else:
            engine.died.set()
            life.cancel()
            await asyncio.gather(life, return_exceptions=True)
            engine, life = start()
        assert set(adapters.verified) <= engine.loaded.keys(), "nothing is listed that is not there"
    life.cancel()
    await asyncio.gather(life, return_exceptions=True)
    engine.stuck, engine.lost_answers = set(), 0
    await adapters.settle(engine)
    assert set(engine.loaded) == set(wanted) - adapters.refused.keys()
    assert adapters.verified == [name for name in wanted if name not in adapters.refused]
    assert set(adapters.refused) <= set(wanted)
    assert not set(adapters.verified) & (swapped | damaged)
