"""The pool on a real Ray of several nodes; where the training does not matter, jobs are stubs."""

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import psutil
import pytest
import ray
from ray._private import ray_constants
from ray._private import utils as ray_utils
from ray.cluster_utils import Cluster
from ray.util import state

from configs.schema import RunConfig
from expert_trainer import roster as module
from expert_trainer.cohort import Cohort
from expert_trainer.errors import BaseModelError, DivergedError, ExpertError, PoolError
from expert_trainer.expert import TrainJob
from expert_trainer.job import JobItem, MemberFailed, Outcome, StepTaken
from expert_trainer.pool import Pool
from expert_trainer.runtime import RAY_ENVIRONMENT, alive_nodes, ray_session
from expert_trainer.schedule import plan_crew
from expert_trainer.shards import Shard, write_shard
from expert_trainer.storage import Storage
from expert_trainer.types import (
    ActorLost,
    ActorUp,
    Document,
    ExpertFailed,
    ExpertProgress,
    ExpertStarted,
    JobFinished,
    PoolEnded,
)
from expert_trainer.workbench import Workbench

QUICK_DEATHS = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}
QUICK_DEATHS |= {"health_check_timeout_ms": 3000, "health_check_failure_threshold": 3}


class Watch:
    seconds = 0.0

    def __enter__(self) -> None:
        self._begin = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic() - self._begin


def make_bench(config: RunConfig) -> Any:
    """Stands in for the workbench."""
    return SimpleNamespace(base=SimpleNamespace(device="cpu"), computing=Watch())


@dataclass(frozen=True)
class Stub:
    """A job that takes steps by sleeping, goes on where it was left, and notes what befalls it."""

    members: tuple[str, ...]
    place: Path
    steps_each: int = 4
    step_s: float = 0.05
    trouble: Mapping[str, str] = field(default_factory=dict)
    """What befalls a member at its second step."""

    @property
    def steps(self) -> int:
        return self.steps_each * len(self.members)

    def steps_of(self, member: str) -> int:
        return self.steps_each

    def only(self, members: Sequence[str]) -> "Stub":
        return replace(self, members=tuple(members))

    def read(self, bench: Any) -> float:
        return time.time()

    def run(self, bench: Any, data: float) -> Iterator[JobItem]:
        with ExitStack() as held:
            for member in self.members:
                held.enter_context(self._alone(member))
                self.note("begin", member, data)
            running = {member: self.taken(member) for member in self.members}
            while running:
                for member in list(running):
                    with bench.computing:
                        time.sleep(self.step_s)
                    running[member] = step = running[member] + 1
                    (self.place / f"{member}.step").write_text(str(step))
                    yield StepTaken(member, step, 1 / step, 10 * step, step * self.step_s)
                    if step == 2 and (cause := self._befall(member)):
                        del running[member]
                        yield MemberFailed(member, cause)
                    elif step >= self.steps_each:
                        del running[member]
                        self.note("end", member, data)
                        yield Outcome(member, os.getpid())

    def taken(self, member: str) -> int:
        """Steps taken so far, over all runs."""
        path = self.place / f"{member}.step"
        return int(path.read_text() or 0) if path.exists() else 0

    def note(self, what: str, member: str, data: float) -> None:
        with (self.place / "notes").open("a") as notes:
            row = {"what": what, "member": member, "pid": os.getpid(), "time": time.time()}
            notes.write(json.dumps(row | {"read": data, "taken": self.taken(member)}) + "\n")

    def _befall(self, member: str) -> ExpertError | None:
        (self.place / f"{member}.step").write_text("0")  # the next run meets it again
        match self.trouble.get(member):
            case "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            case "breaks":
                raise RuntimeError("nobody foresaw this")
            case "fails":
                return ExpertError(f"{member} is bad")
            case "diverges":
                return DivergedError(f"{member} diverged")
        (self.place / f"{member}.step").write_text("2")
        return None

    @contextmanager
    def _alone(self, member: str) -> Iterator[None]:
        with (self.place / f"{member}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                (self.place / "overlap").write_text(member)
                raise
            yield


def stubs(place: Path, count: int, **settings: Any) -> list[Stub]:
    return [Stub((f"e{number}",), place, **settings) for number in range(count)]


def notes(place: Path, what: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (place / "notes").read_text().splitlines()]
    return [row for row in rows if row["what"] == what]


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import tests


class Nodes:
    """The nodes of a cluster on this machine, beside a head without cores."""

    def __init__(self) -> None:
        head = {"num_cpus": 0, "node_ip_address": "127.0.0.1", "_system_config": QUICK_DEATHS}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self._cluster.address

    def add(self, cpus: int) -> Any:
        return self._cluster.add_node(num_cpus=cpus, node_ip_address="127.0.0.1")

    def remove(self, node: Any, *, graceful: bool = True) -> None:
        self._cluster.remove_node(node, allow_graceful=graceful)

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A connection to the cluster, which has no cores yet."""
    before = set(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)  # listen on loopback alone
        # a node that is added would take SIGTERM over, which only the main thread can
        patch.setattr(ray_utils, "set_sigterm_handler", lambda handler: None)
        made = Nodes()
        patch.setenv("RAY_ADDRESS", made.address)
        try:
            with ray_session():
                yield made
        finally:
            made.close()
    _, left = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, 60)
    assert not left, "the cluster left processes behind"


@pytest.fixture
def two_cores(nodes: Nodes) -> Iterator[Any]:
    node = nodes.add(2)
    yield node
    nodes.remove(node)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where stubs write; no member was ever in two actors' hands at once."""
    directory = tmp_path / "stubs"
    directory.mkdir()
    yield directory
    assert not (directory / "overlap").exists()


MakeConfig = Callable[..., RunConfig]
Event = TypeVar("Event")


def start(config: RunConfig, jobs: Sequence[Any], bench: Any = make_bench) -> Iterator[Any]:
    crew = plan_crew(len(jobs), config.experts, alive_nodes())
    return Pool(config, crew, make_bench=bench).run(jobs)


def of(events: Iterable[Any], kind: type[Event]) -> list[Event]:
    return [event for event in events if isinstance(event, kind)]


def ended(events: Iterable[Any]) -> Counter[str]:
    """How often each member ended."""
    events = list(events)
    finals = [event for event in of(events, ExpertFailed) if event.final]
    return Counter(event.id for event in [*of(events, JobFinished), *finals])


def once(jobs: Iterable[Any]) -> Counter[str]:
    return Counter(member for job in jobs for member in job.members)


def started(events: Iterable[Any]) -> list[tuple[str, int]]:
    return [(event.id, event.attempt) for event in of(events, ExpertStarted)]


def failed(events: Iterable[Any]) -> list[tuple[str, int, bool]]:
    return [(event.id, event.attempt, event.final) for event in of(events, ExpertFailed)]


def names_of_tasks() -> set[str]:
    return {task.name for task in state.list_tasks()}


def address_of(node: Any) -> str:
    return next(known.address for known in alive_nodes() if known.id == node.node_id)


def eventually(look: Callable[[], bool], timeout: float = 60.0) -> bool:
    deadline = time.monotonic() + timeout
    while not (seen := look()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return seen


def test_longest_first_with_the_next_job_read_ahead_and_all_named(
    two_cores: Any, make_config: MakeConfig, place: Path
) -> None:
    jobs = [Stub((f"e{steps}",), place, steps) for steps in range(3, 11)]
    jobs.append(Stub(("left", "right"), place, 40))
    events, shown, begun_at = [], {}, time.monotonic()
    for event in start(make_config(), jobs):
        events.append(event)
        if isinstance(event, ExpertStarted) and event.id == "left":
            assert eventually(lambda: "left, right" in names_of_tasks()), "tasks are named"
            shown = {actor.name: actor.state for actor in state.list_actors()}
            pid = next(up.pid for up in of(events, ActorUp) if up.actor == event.actor)
            title = psutil.Process(pid).cmdline()[0]  # what the dashboard lists for a node
            assert title == "ray::left, right"
    assert ended(events) == once(jobs)
    ups = of(events, ActorUp)
    assert len({up.pid for up in ups}) == 2
    assert {up.device for up in ups} == {"cores:0-0", "cores:1-1"}
    assert {up.node for up in ups} == {address_of(two_cores)}, "nodes of one host go by address"
    assert all(shown[up.actor] == "ALIVE" for up in ups)
    assert all(up.actor.startswith("trainer-") for up in ups)
    begun = [note["member"] for note in notes(place, "begin")]
    assert begun.index("left") < begun.index("right")
    assert set(begun[:3]) == {"left", "right", "e10"}, "the two actors begin at the same time"
    assert [name for name in begun if name[0] == "e"] == [f"e{n}" for n in range(10, 2, -1)]
    # what was put on deck was read before the job before it ended
    by_actor: dict[int, list[dict[str, Any]]] = {}
    for note in notes(place, "end"):
        by_actor.setdefault(note["pid"], []).append(note)
    ahead = [
        later["read"] < earlier["time"]
        for rows in by_actor.values()
        for earlier, later in pairwise(rows)
        if {earlier["member"], later["member"]} != {"left", "right"}
    ]
    assert 2 <= sum(ahead) < len(ahead), "the last jobs are kept for whoever is free"
    end = events[-1]
    assert isinstance(end, PoolEnded)
    asleep = sum(job.steps for job in jobs) * 0.05
    assert asleep <= end.computing <= end.seconds <= len(ups) * (time.monotonic() - begun_at)
    progress = of(events, ExpertProgress)
    assert progress[0].step == 1
    for event in progress:
        assert event.actor in shown
        assert event.step <= event.steps


def test_a_killed_actor_is_replaced_and_its_job_on_deck_is_unharmed(
    two_cores: Any, make_config: MakeConfig, place: Path
) -> None:
    jobs = stubs(place, 3, steps_each=24)
    events, killed = [], 0
    for event in start(make_config(actors=1), jobs):
        events.append(event)
        if isinstance(event, ExpertProgress) and event.step >= 3 and not killed:
            killed = of(events, ActorUp)[-1].pid
            os.kill(killed, signal.SIGKILL)
    assert ended(events) == once(jobs)
    assert failed(events) == [("e0", 1, False)]
    assert started(events) == [("e0", 1), ("e0", 2), ("e1", 1), ("e2", 1)]
    assert "process died" in of(events, ExpertFailed)[0].cause
    assert "process died" in of(events, ActorLost)[0].cause
    again = notes(place, "begin")[1]
    assert again["member"] == "e0"
    assert again["taken"] >= 3, "it goes on where it was"
    assert again["pid"] != killed


def test_what_ails_one_member_is_its_own_affair(
    two_cores: Any, make_config: MakeConfig, place: Path
) -> None:
    trouble = {"poison": "dies", "bad": "fails", "nan": "diverges", "odd": "breaks"}
    jobs = [
        Stub(("a", "poison", "b"), place, 5, 0.02, trouble),
        Stub(("bad", "c", "nan"), place, 4, 0.02, trouble),
        Stub(("odd", "d"), place, 3, 0.02, trouble),
    ]
    events = list(start(make_config(max_retries=2), jobs))
    assert ended(events) == once(jobs)
    finals = {event.id: event for event in of(events, ExpertFailed) if event.final}
    assert finals.keys() == trouble.keys()
    assert {name: final.attempt for name, final in finals.items()} == {
        "poison": 3,
        "bad": 3,
        "nan": 2,
        "odd": 3,
    }
    assert finals["bad"].cause == "bad is bad"
    assert finals["nan"].cause == "nan diverged"
    assert "process died" in finals["poison"].cause
    assert finals["odd"].cause == "RuntimeError: nobody foresaw this"
    tries = Counter(note["member"] for note in notes(place, "begin"))
    assert (tries["poison"], tries["a"], tries["b"], tries["c"]) == (3, 3, 3, 1)
    # neither a death nor an error that nobody foresaw leaves its process in use
    lost = {event.actor for event in of(events, ActorLost)}
    assert len(lost) == 6
    ups = {event.actor: event.pid for event in of(events, ActorUp)}
    culprits = {
        note["pid"] for note in notes(place, "begin") if note["member"] in ("poison", "odd")
    }
    assert culprits == {ups[actor] for actor in lost}


def test_a_node_goes_and_another_comes_while_jobs_run(
    two_cores: Any, nodes: Nodes, make_config: MakeConfig, place: Path
) -> None:
    goes, comes = nodes.add(1), []
    address = address_of(goes)
    jobs = stubs(place, 14, steps_each=12, step_s=0.1)
    events = []
    worked: set[str] = set()
    loss = threading.Thread(target=nodes.remove, args=(goes,), kwargs={"graceful": False})
    for event in start(make_config(actors="auto", max_retries=0), jobs):
        events.append(event)
        there = {up.actor for up in of(events, ActorUp) if up.node == address}
        if isinstance(event, ExpertStarted) and event.actor in there and not worked:
            worked = there
            loss.start()
            comes.append(nodes.add(1))
    loss.join()
    assert ended(events) == once(jobs)
    assert failed(events) == [], "it was not the experts' fault"
    lost = [event for event in of(events, ActorLost) if event.actor in worked]
    assert [event.cause for event in lost] == [f"its node {address} is gone"]
    mine = address_of(comes[0])
    newcomers = {up.actor for up in of(events, ActorUp) if up.node == mine}
    assert newcomers, "the new node's core has an actor"
    assert newcomers & {event.actor for event in of(events, ExpertStarted)}, "which works"
    begun = Counter(note["member"] for note in notes(place, "begin"))
    assert sorted(begun.values()) == [1] * 13 + [2], "only what ran there was begun again"
    nodes.remove(comes[0])


def test_without_any_node_the_pool_waits_for_one(
    nodes: Nodes,
    make_config: MakeConfig,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "WAIT_S", 1.0)
    monkeypatch.setattr(module, "TEND_S", 0.5)
    goes, comes = nodes.add(1), []

    def replace_node() -> None:
        nodes.remove(goes)
        assert eventually(lambda: "waiting for one with 2 experts to go" in caplog.text)
        comes.append(nodes.add(1))
        over.wait()  # Ray's processes end with the thread that started them

    over = threading.Event()
    jobs = stubs(place, 2)
    events = []
    thread = threading.Thread(target=replace_node)
    try:
        with caplog.at_level(logging.WARNING):
            for event in start(make_config(max_retries=0), jobs):
                events.append(event)
                if isinstance(event, ExpertStarted) and not thread.ident:
                    thread.start()
    finally:
        over.set()
    thread.join()
    assert ended(events) == once(jobs)
    assert failed(events) == []
    nodes.remove(comes[0])


def test_a_node_where_nothing_starts_is_left_out_and_the_last_one_ends_the_run(
    two_cores: Any,
    nodes: Nodes,
    make_config: MakeConfig,
    place: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    good = nodes.add(1)
    bad = two_cores.node_id

    def choosy(config: RunConfig) -> Any:
        if ray.get_runtime_context().get_node_id() == bad:
            raise BaseModelError("no base here")
        return make_bench(config)

    jobs = stubs(place, 6, step_s=0.25)
    with caplog.at_level(logging.WARNING):
        events = list(start(make_config(actors="auto"), jobs, choosy))
    assert ended(events) == once(jobs)
    assert {up.node for up in of(events, ActorUp)} == {address_of(good)}
    warning = next(r.message for r in caplog.records if "gets no more" in r.message)
    assert warning.startswith(address_of(two_cores))
    assert "no base here" in warning
    nodes.remove(good)

    with pytest.raises(BaseModelError, match="no base here"):
        list(start(make_config(), stubs(place, 2), choosy))

    def broken(config: RunConfig) -> Any:
        raise OSError("no such device")

    with pytest.raises(PoolError, match=r"no training actor stays up: OSError: no such device"):
        list(start(make_config(), stubs(place, 2), broken))


@pytest.fixture
def train_jobs(corpus_dir: Path, tmp_path: Path) -> Callable[[RunConfig, str], list[TrainJob]]:
    """One job per topic of the corpus, whose experts appear under the directory given."""
    work = Storage(tmp_path)

    def shard(name: str, topic: str) -> Shard:
        rows = map(json.loads, (corpus_dir / f"{name}.jsonl").read_text().splitlines())
        texts = [Document(row["id"], row["text"]) for row in rows if row["domain"] == topic]
        return write_shard(work, f"{name}-{topic}.jsonl", texts)

    def make(config: RunConfig, root: str) -> list[TrainJob]:
        return [
            TrainJob(
                id=f"expert-{cluster:04d}",
                shards=(shard("train", topic),),
                heldout=(shard("valid", topic),),
                heldout_limit=1000,
                steps=80,
                learning_rate=config.experts.learning_rate,
                seed=cluster,
                experts=config.experts,
                base_digest="a" * 64,
                tokenizer_digest="b" * 64,
                dtype="float32",
                root=Storage(tmp_path / root),
            )
            for cluster, topic in enumerate(("sea", "kitchen", "code"))
        ]

    return make


def test_experts_that_lost_their_actor_come_out_the_same_to_the_bit(
    two_cores: Any,
    make_config: MakeConfig,
    train_jobs: Callable[[RunConfig, str], list[TrainJob]],
    tmp_path: Path,
) -> None:
    config = make_config(dropout=0.1, precision="float32", checkpoint_s=0.05)

    def cohorts(root: str) -> list[Cohort]:
        one, two, three = train_jobs(config, root)
        checkpoints = Storage(tmp_path / root / "checkpoints")
        return [Cohort((one, two), checkpoints, 0.05), Cohort((three,), checkpoints, 0.05)]

    events, killed = [], set()
    for event in start(config, cohorts("pooled"), None):
        events.append(event)
        if isinstance(event, ExpertProgress) and event.id == "expert-0000" and event.step >= 5:
            pid = next(up.pid for up in of(events, ActorUp) if up.actor == event.actor)
            if not killed:
                killed.add(pid)
                os.kill(pid, signal.SIGKILL)
    assert killed
    assert [event[:2] for event in failed(events)] == [("expert-0000", 1), ("expert-0001", 1)]
    assert ended(events) == once(cohorts("pooled"))
    first = next(
        progress
        for progress in events[events.index(of(events, ExpertFailed)[-1]) :]
        if isinstance(progress, ExpertProgress) and progress.id == "expert-0000"
    )
    assert first.step > 1, "it goes on from its checkpoint"
    bench = Workbench(config)
    for cohort in cohorts("here"):
        for item in cohort.run(bench, cohort.read(bench)):
            assert not isinstance(item, MemberFailed)
    weights = "adapter_model.safetensors"
    results = {event.id: event.outcome for event in of(events, JobFinished)}
    for job in train_jobs(config, "pooled"):
        pooled, here = ((tmp_path / r / job.id / weights).read_bytes() for r in ("pooled", "here"))
        assert pooled == here
        assert job.finished() == results[job.id]


DRIVER = """
import importlib.util, sys
from pathlib import Path
from typing import Any
spec = importlib.util.spec_from_file_location("pool_stubs", sys.argv[1])
stubs = importlib.util.module_from_spec(spec)
sys.modules["pool_stubs"] = stubs
spec.loader.exec_module(stubs)
from configs.schema import RunConfig
config = RunConfig.model_validate_json(sys.argv[3])
with stubs.ray_session(cpus=2):
    for event in stubs.start(config, stubs.unfinished(Path(sys.argv[2]))):
        number = getattr(event, "pid", getattr(event, "step", ""))
        print(type(event).__name__, number, flush=True)
"""


def unfinished(place: Path) -> list[Stub]:
    jobs = stubs(place, 3, steps_each=60)
    return [job for job in jobs if job.taken(job.members[0]) < job.steps]


def drive(place: Path, config: RunConfig) -> subprocess.Popen[str]:
    arguments = [__file__, str(place), config.model_dump_json()]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_a_killed_driver_leaves_no_process_and_the_same_jobs_go_on(
    two_cores: Any, make_config: MakeConfig, place: Path
) -> None:
    config = make_config(actors=2)
    driver = drive(place, config)
    assert driver.stdout is not None
    actors = set()
    try:
        for line in driver.stdout:
            words = line.split()
            if words[0] == "ActorUp":
                actors.add(int(words[1]))
            if words[0] == "ExpertProgress" and int(words[1]) >= 5 and len(actors) == 2:
                break
        left = psutil.Process(driver.pid).children(recursive=True)
        directories = {
            path
            for path in Path(tempfile.gettempdir()).glob("introvert-*")
            if any(str(path) in word for process in left for word in process.cmdline())
        }
    finally:
        driver.kill()
        driver.wait()
        driver.stdout.close()
    assert actors <= {process.pid for process in left}
    assert len(directories) == 1
    _, alive = psutil.wait_procs(left, timeout=60)
    assert not alive
    assert not any(path.exists() for path in directories)
    left_over = unfinished(place)
    assert len(left_over) >= 2
    events = list(start(config, left_over))
    assert ended(events) == once(left_over)
    assert Counter(note["member"] for note in notes(place, "end")) == once(stubs(place, 3))
    resumed = [note for note in notes(place, "begin") if note["taken"] > 0]
    assert resumed, "what ran when the driver was killed goes on from there"
