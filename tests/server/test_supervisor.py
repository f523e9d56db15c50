from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import psutil
import pytest

from configs.manifest import FileEntry, Fingerprint
from configs.schema import ServingConfig
from expert_trainer.hashed import HashedDirectory
from expert_trainer.storage import Storage
from server.engine import Adapter, EngineCommand, Room
from server.engine_client import EngineClient
from server.supervisor import Identity, Supervisor
from server.table import WorkerEntry

FAKE = Path(__file__).parent / "fake_engine.py"
PROBE = [3, 1, 4, 1, 5]
KEY = "sesame"


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake = _load(FAKE)


def adapter(tmp_path: Path, number: int, *, answers_as: str | None = None) -> Adapter:
    name = f"expert-{number:04d}@{number:012x}"
    directory = tmp_path / name
    directory.mkdir()
    if answers_as:
        (directory / "as.json").write_text(answers_as)
    logprobs = [fake.logprob(name, place) for place in range(1, len(PROBE))]
    return Adapter(name, str(directory), 8, Fingerprint(token_ids=PROBE, logprobs=logprobs))


class Fixture:
    """Makes supervisors over fake engines and stops them at the end."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.behaviours: list[str] = []
        self.starts = 0
        self.rooms: list[Room | None] = []
        self.made: list[Supervisor] = []

    def command(self, room: Room | None, host: str, port: int) -> EngineCommand:
        self.starts += 1
        self.rooms.append(room)
        argv = (sys.executable, str(FAKE), str(port), *self.behaviours)
        return EngineCommand(argv=argv, env={"FAKE_MARK": "42", "VLLM_API_KEY": KEY})

    def __call__(
        self, *behaviours: str, adapters: Sequence[Adapter] = (), **serving: object
    ) -> Supervisor:
        self.behaviours = list(behaviours)
        limits = {"health_interval_s": 0.05, "startup_timeout_s": 60.0, "hang_timeout_s": 30.0}
        supervisor = Supervisor(
            identity=Identity("worker-0", "127.0.0.1", "cores:0"),
            command_for=self.command,
            base_name=fake.BASE,
            adapters=adapters,
            serving=ServingConfig.model_validate({**limits, **serving}),
            log_path=self.tmp_path / "logs" / "worker-0.log",
            api_key=KEY,
        )
        self.made.append(supervisor)
        supervisor.start()
        return supervisor


@pytest.fixture
async def supervise(tmp_path: Path) -> AsyncIterator[Fixture]:
    fixture = Fixture(tmp_path)
    yield fixture
    await asyncio.gather(*(supervisor.stop() for supervisor in fixture.made))
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if str(FAKE) in (p.info["cmdline"] or [])
    ]


@pytest.fixture
def unwatched_health(monkeypatch: pytest.MonkeyPatch) -> None:
    """Health checks find no fault: with a short limit a busy machine is one."""

    async def never(supervisor: Supervisor, client: EngineClient) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Supervisor, "_watch", never)


async def until(
    supervisor: Supervisor, condition: Callable[[WorkerEntry], bool], seconds: float = 60.0
) -> WorkerEntry:
    deadline = time.monotonic() + seconds
    while not condition(supervisor.entry):
        assert time.monotonic() < deadline, supervisor.entry
        await asyncio.sleep(0.01)
    return supervisor.entry


async def get(url: str) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
        answer: dict[str, Any] = await response.json()
        return answer


def is_ready(entry: WorkerEntry) -> bool:
    return entry.state == "ready"


async def test_ready_means_loaded_verified_and_known(supervise: Fixture, tmp_path: Path) -> None:
    adapters = [adapter(tmp_path, 1), adapter(tmp_path, 2)]
    supervisor = supervise("slow-start=0.3", adapters=adapters)
    first = supervisor.entry
    assert (first.state, first.experts) == ("starting", [])
    entry = await until(supervisor, is_ready)
    assert entry.experts == [a.served_name for a in adapters]
    assert (entry.engine, entry.detail, entry.restarts) == ("vllm fake", "", 0)
    assert supervisor.max_model_len == fake.MAX_MODEL_LEN
    assert entry.pid
    assert psutil.Process(entry.pid).cmdline()[1] == str(FAKE)
    environment = await get(f"{entry.url}/environment")
    assert environment["FAKE_MARK"] == "42"


async def test_a_killed_engine_is_down_at_once_and_ready_again(
    supervise: Fixture, tmp_path: Path
) -> None:
    supervisor = supervise(adapters=[adapter(tmp_path, 1)])
    before = await until(supervisor, is_ready)
    assert before.pid
    child = psutil.Process(before.pid).children()[0]
    os.kill(before.pid, signal.SIGKILL)
    down = await until(supervisor, lambda entry: entry.state == "down")
    assert "killed by signal 9" in down.detail
    assert down.experts == []
    after = await until(supervisor, is_ready)
    assert after.pid != before.pid
    assert (after.restarts, after.detail) == (1, "")
    assert after.experts == before.experts
    assert not child.is_running()


async def test_a_killed_guard_takes_its_engine_along(supervise: Fixture) -> None:
    supervisor = supervise()
    before = await until(supervisor, is_ready)
    assert before.pid
    engine = psutil.Process(before.pid)
    outer = engine.parent().parent()  # type: ignore[union-attr]
    assert outer
    outer.kill()
    await until(supervisor, lambda entry: is_ready(entry) and entry.restarts == 1)
    await asyncio.to_thread(psutil.wait_procs, [engine], timeout=60)
    assert not engine.is_running()


async def test_an_engine_that_hangs_is_replaced(supervise: Fixture, tmp_path: Path) -> None:
    supervisor = supervise(f"hang={tmp_path / 'hang'}", hang_timeout_s=1.0)
    before = await until(supervisor, is_ready)
    (tmp_path / "hang").touch()
    down = await until(supervisor, lambda entry: entry.state == "down")
    assert "hung" in down.detail
    supervise.behaviours = []
    after = await until(supervisor, lambda entry: is_ready(entry) and entry.pid != before.pid)
    assert after.restarts >= 1  # more than one where an engine is slow to say that it is well


async def test_an_engine_that_is_well_by_its_own_word_but_computes_nothing_is_replaced(
    supervise: Fixture, unwatched_health: None, tmp_path: Path
) -> None:
    supervisor = supervise(f"stall={tmp_path / 'stall'}", hang_timeout_s=0.5)
    await until(supervisor, is_ready)
    (tmp_path / "stall").touch()
    down = await until(supervisor, lambda entry: entry.state == "down")
    assert "computed nothing, with a request waiting" in down.detail
    supervise.behaviours = []
    await until(supervisor, lambda entry: is_ready(entry) and entry.restarts >= 1)


async def test_an_engine_that_is_busy_with_others_is_left_alone(
    supervise: Fixture,
    unwatched_health: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    judged = asyncio.Event()
    generates = Supervisor._generates
    late = 0

    async def watched(supervisor: Supervisor, client: EngineClient, limit_s: float) -> bool:
        nonlocal late
        if late == 2:
            judged.set()
        answered = await generates(supervisor, client, limit_s)
        late += not answered
        return answered

    monkeypatch.setattr(Supervisor, "_generates", watched)
    supervisor = supervise(f"stall={tmp_path / 'stall'}", "busy=1", hang_timeout_s=0.5)
    await until(supervisor, is_ready)
    (tmp_path / "stall").touch()
    async with asyncio.timeout(60):
        await judged.wait()
    assert (supervisor.entry.state, supervisor.entry.restarts) == ("ready", 0)


async def test_a_stopped_engine_is_replaced(supervise: Fixture) -> None:
    supervisor = supervise(hang_timeout_s=1.0)
    before = await until(supervisor, is_ready)
    assert before.pid
    os.kill(before.pid, signal.SIGSTOP)
    after = await until(supervisor, lambda entry: is_ready(entry) and entry.restarts >= 1)
    assert after.pid != before.pid
    assert not psutil.pid_exists(before.pid)


async def test_failed_starts_in_a_row_are_reported_with_the_engines_last_words(
    supervise: Fixture,
) -> None:
    supervisor = supervise("die-at-start=1", max_failed_starts=2)
    entry = await until(supervisor, lambda entry: entry.state == "failed")
    assert supervise.starts == 2
    assert entry.detail.startswith("2 failed starts in a row")
    assert "exit code 1" in entry.detail
    assert "RuntimeError: no memory left for the fake cache" in entry.detail


async def test_a_failed_worker_recovers_when_the_cause_is_gone(supervise: Fixture) -> None:
    supervisor = supervise("die-at-start=1", max_failed_starts=1)
    await until(supervisor, lambda entry: entry.state == "failed")
    supervise.behaviours = []
    entry = await until(supervisor, is_ready)
    assert (entry.restarts, entry.detail) == (0, "")


async def test_an_engine_too_slow_to_start_is_given_up(supervise: Fixture) -> None:
    supervisor = supervise("slow-start=60", startup_timeout_s=0.5, max_failed_starts=1)
    entry = await until(supervisor, lambda entry: entry.state == "failed")
    assert "did not answer within 0.5 s" in entry.detail


async def test_a_command_that_cannot_run_is_a_failed_start(
    supervise: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervise.command = lambda *_: EngineCommand(("no-such-engine",))  # type: ignore[method-assign]
    supervisor = supervise(max_failed_starts=1)
    entry = await until(supervisor, lambda entry: entry.state == "failed")
    assert "no-such-engine: No such file or directory" in entry.detail


async def test_an_adapter_that_answers_as_another_is_refused_and_named(
    supervise: Fixture, tmp_path: Path
) -> None:
    right = adapter(tmp_path, 1)
    swapped = adapter(tmp_path, 2, answers_as=right.served_name)
    supervisor = supervise(adapters=[right, swapped])
    entry = await until(supervisor, is_ready)
    assert entry.experts == [right.served_name]
    assert f"{swapped.served_name} refused" in entry.detail
    models = await get(f"{entry.url}/v1/models")
    served = {model["id"] for model in models["data"]}
    assert served == {fake.BASE, right.served_name}


async def test_another_set_is_served_by_the_running_engine(
    supervise: Fixture, tmp_path: Path
) -> None:
    old, kept, new = (adapter(tmp_path, number) for number in (1, 2, 3))
    swapped = adapter(tmp_path, 4, answers_as=old.served_name)
    supervisor = supervise(adapters=[old, kept])
    before = await until(supervisor, is_ready)
    supervisor.serve([kept, swapped, new])
    names = [kept.served_name, new.served_name]
    entry = await until(supervisor, lambda entry: entry.experts == names)
    assert list(entry.refused) == [swapped.served_name]
    assert entry.detail == f"{swapped.served_name} refused: {entry.refused[swapped.served_name]}"
    assert (entry.pid, entry.restarts, entry.state) == (before.pid, 0, "ready")
    assert supervise.starts == 1
    calls = (await get(f"{entry.url}/calls"))["calls"]
    assert calls[2:] == [
        f"load {swapped.served_name}",
        f"unload {swapped.served_name}",
        f"load {new.served_name}",
        f"unload {old.served_name}",
    ]
    models = await get(f"{entry.url}/v1/models")
    assert {model["id"] for model in models["data"]} == {fake.BASE, *names}


async def test_fingerprints_can_be_left_unchecked(supervise: Fixture, tmp_path: Path) -> None:
    swapped = adapter(tmp_path, 2, answers_as="another")
    supervisor = supervise(adapters=[swapped], verify_fingerprints=False)
    entry = await until(supervisor, is_ready)
    assert entry.experts == [swapped.served_name]


async def test_an_adapter_that_cannot_be_loaded_is_refused_alone(
    supervise: Fixture, tmp_path: Path
) -> None:
    right = adapter(tmp_path, 1)
    gone = dataclasses.replace(adapter(tmp_path, 2), path=str(tmp_path / "nowhere"))
    supervisor = supervise(adapters=[gone, right])
    entry = await until(supervisor, is_ready)
    assert entry.experts == [right.served_name]
    assert entry.detail == f"{gone.served_name} refused: {entry.refused[gone.served_name]}"
    assert "nowhere is gone" in entry.detail


def behind_url(tmp_path: Path, url: str, number: int) -> Adapter:
    """An adapter that is not on this machine yet."""
    local = adapter(tmp_path, number)
    directory = Storage(url) / local.served_name
    directory.write("weights.safetensors", local.served_name.encode())
    digest = hashlib.sha256(local.served_name.encode()).hexdigest()
    files = (FileEntry(path="weights.safetensors", sha256=digest, bytes=len(local.served_name)),)
    copy = tmp_path / "copies" / local.served_name
    return dataclasses.replace(local, path=str(copy), source=HashedDirectory(directory, files))


async def test_adapters_behind_a_url_are_copied_before_they_are_loaded(
    supervise: Fixture, tmp_path: Path, ftp_url: str
) -> None:
    right, damaged = (behind_url(tmp_path, ftp_url, number) for number in (1, 2))
    assert damaged.source
    damaged.source.place.write("weights.safetensors", b"something else")
    supervisor = supervise(adapters=[damaged, right])
    entry = await until(supervisor, is_ready)
    assert entry.experts == [right.served_name]
    assert f"{damaged.served_name} refused: ftp://introvert:***@" in entry.detail
    assert "open-sesame" not in entry.detail
    assert (Path(right.path) / "weights.safetensors").read_text() == right.served_name
    assert damaged.served_name not in [copy.name for copy in (tmp_path / "copies").iterdir()]


async def test_a_bundle_out_of_reach_is_a_failed_start_and_copies_do_without_it(
    supervise: Fixture, tmp_path: Path, ftp: Callable[..., AbstractContextManager[str]]
) -> None:
    (tmp_path / "shown").mkdir()
    with ftp(tmp_path / "shown") as url:
        far = behind_url(tmp_path, url, 1)
        missing = behind_url(tmp_path, url, 2)
        first = supervise(adapters=[far])
        await until(first, is_ready)
        await first.stop()
    second = supervise(adapters=[far])
    await until(second, is_ready)
    third = supervise(adapters=[far, missing], max_failed_starts=1)
    entry = await until(third, lambda entry: entry.state == "failed")
    assert "cannot be started: ftp://introvert:***@" in entry.detail
    assert "see that the server can be reached" in entry.detail


async def test_an_expert_that_generates_nothing_is_refused(
    supervise: Fixture, tmp_path: Path
) -> None:
    dumb = adapter(tmp_path, 1)
    supervisor = supervise(f"mute={dumb.served_name}", adapters=[dumb])
    entry = await until(supervisor, is_ready)
    assert entry.experts == []
    assert "generated nothing" in entry.detail


async def test_an_expert_whose_answer_cannot_be_read_is_refused_alone(
    supervise: Fixture, tmp_path: Path
) -> None:
    right, garbled = adapter(tmp_path, 1), adapter(tmp_path, 2)
    supervisor = supervise(f"garble={garbled.served_name}", adapters=[garbled, right])
    entry = await until(supervisor, is_ready)
    assert entry.experts == [right.served_name]
    assert f"{garbled.served_name} refused: /v1/completions answered in a shape" in entry.detail


async def test_an_unforeseen_error_costs_one_life_of_the_engine(
    supervise: Fixture, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    version, calls = EngineClient.version, 0

    async def fails_once(client: EngineClient) -> str:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ZeroDivisionError("nobody foresaw it")
        return await version(client)

    monkeypatch.setattr(EngineClient, "version", fails_once)
    supervisor = supervise(max_failed_starts=1)
    failed = await until(supervisor, lambda entry: entry.state == "failed")
    assert "ZeroDivisionError: nobody foresaw it" in failed.detail
    assert [record.exc_info for record in caplog.records if record.levelname == "ERROR"]
    await until(supervisor, is_ready)
    assert supervise.starts == 2


async def test_a_base_that_generates_nothing_is_no_ready_worker(supervise: Fixture) -> None:
    supervisor = supervise(f"mute={fake.BASE}", max_failed_starts=1)
    entry = await until(supervisor, lambda entry: entry.state == "failed")
    assert "fake-base generated nothing" in entry.detail


async def test_stop_leaves_no_process(supervise: Fixture) -> None:
    supervisor = supervise()
    entry = await until(supervisor, is_ready)
    assert entry.pid
    tree = [psutil.Process(entry.pid), *psutil.Process(entry.pid).children(recursive=True)]
    assert len(tree) == 2
    await supervisor.stop()
    assert not [process for process in tree if process.is_running()]


async def test_stop_while_starting_leaves_no_process(supervise: Fixture) -> None:
    supervisor = supervise("slow-start=60")
    await until(supervisor, lambda entry: entry.pid is not None)
    await supervisor.stop()
