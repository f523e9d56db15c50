"""Experts trained together: the same as alone, resumed to the bit, failing alone."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs.schema import ExpertsConfig, RunConfig
from expert_trainer.cohort import Cohort
from expert_trainer.errors import DivergedError, ExpertError
from expert_trainer.expert import InitialAdapter, Result, TrainJob, seed_of
from expert_trainer.job import JobItem, Measured, MemberFailed, Outcome, StepTaken
from expert_trainer.shards import Shard, write_shard
from expert_trainer.storage import Storage
from expert_trainer.types import Document
from expert_trainer.workbench import Workbench

TOPICS = ("sea", "kitchen", "code")
SETTINGS: dict[str, Any] = {"precision": "float32", "batch_rows": 2, "sequence_length": 48}


class Room:
    """A directory to train in: shards of three topics, a workbench, jobs on them."""

    def __init__(self, path: Path, config: RunConfig, corpus: dict[str, list[Document]]) -> None:
        self.path, self.experts = path, config.experts
        self.bench = Workbench(config)
        work = Storage(path)
        self.shards = {
            topic: write_shard(work, f"{topic}.jsonl", documents[:24])
            for topic, documents in corpus.items()
        }
        self.heldout = {
            topic: write_shard(work, f"{topic}-heldout.jsonl", documents[24:])
            for topic, documents in corpus.items()
        }

    def job(self, topic: str, steps: int = 8, root: str = "experts", **changes: Any) -> TrainJob:
        job = TrainJob(
            id=f"expert-{TOPICS.index(topic):04d}",
            shards=(self.shards[topic],),
            heldout=(self.heldout[topic],),
            heldout_limit=200,
            steps=steps,
            learning_rate=1e-2,
            seed=seed_of(3, topic),
            experts=self.experts,
            base_digest="b" * 64,
            tokenizer_digest="c" * 64,
            dtype="float32",
            root=Storage(self.path / root),
        )
        return replace(job, **changes)

    def cohort(self, *jobs: TrainJob, checkpoint_s: float = 0.0) -> Cohort:
        return Cohort(jobs, Storage(self.path / "checkpoints"), checkpoint_s)

    def run(self, cohort: Cohort) -> Iterator[JobItem]:
        return cohort.run(self.bench, cohort.read(self.bench))

    def train(self, *jobs: TrainJob) -> list[JobItem]:
        return list(self.run(self.cohort(*jobs)))

    def weights(self, job: TrainJob) -> dict[str, torch.Tensor]:
        return load_file(Path(job.root.url) / job.id / "adapter_model.safetensors")

    def bytes_of(self, job: TrainJob) -> bytes:
        return Storage(job.root.url).read(f"{job.id}/adapter_model.safetensors")


MakeRoom = Callable[..., Room]


@pytest.fixture
def make_room(
    make_config: Callable[..., RunConfig], corpus_dir: Path, tmp_path: Path
) -> Callable[..., Room]:
    rows = [json.loads(line) for line in (corpus_dir / "train.jsonl").read_text().splitlines()]
    corpus = {
        topic: [Document(row["id"], row["text"]) for row in rows if row["domain"] == topic]
        for topic in TOPICS
    }

    def make(**experts: Any) -> Room:
        return Room(tmp_path, make_config(**(SETTINGS | experts)), corpus)

    return make


def results(items: Sequence[JobItem]) -> dict[str, Result]:
    return {item.id: item.value for item in items if isinstance(item, Outcome)}


def failures(items: Sequence[JobItem]) -> dict[str, ExpertError]:
    return {item.id: item.cause for item in items if isinstance(item, MemberFailed)}


def alone(job: TrainJob, root: Path) -> TrainJob:
    return replace(job, root=Storage(root / "alone"))


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize(
    "settings",
    [{}, {"dropout": 0.2}, {"gradient_accumulation": 3, "batch_rows": 1}, {"weight_decay": 0.1}],
    ids=["plain", "dropout", "accumulation", "decay"],
)
def test_together_as_alone(make_room: MakeRoom, members: int, settings: dict[str, Any]) -> None:
    """Unequal steps; equal up to 1e-5 of values that reach 0.3, where the order of sums differs."""
    room = make_room(**settings)
    jobs = [room.job(topic, steps) for topic, steps in zip(TOPICS, (7, 3, 5), strict=True)]
    jobs = jobs[:members]
    together = results(room.train(*jobs))
    for job in jobs:
        by_itself = alone(job, room.path)
        single = results(room.train(by_itself))[job.id]
        mine, theirs = room.weights(job), room.weights(by_itself)
        for name, value in mine.items():
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-5)
        assert max(v.abs().max() for n, v in mine.items() if "lora_B" in n) > 1e-3, "it learnt"
        assert together[job.id].tokens_seen == single.tokens_seen
        assert [p.loss for p in together[job.id].loss_curve] == pytest.approx(
            [p.loss for p in single.loss_curve], abs=1e-4
        )


def test_together_as_alone_in_bfloat16(make_room: MakeRoom) -> None:
    """A value that rounds the other way once moves AdamW's step: a hundredth of what is learnt."""
    room = make_room(precision="bfloat16")
    jobs = [room.job(topic, 6) for topic in TOPICS]
    room.train(*jobs)
    for job in jobs:
        by_itself = alone(job, room.path)
        room.train(by_itself)
        mine, theirs = room.weights(job), room.weights(by_itself)
        moved = torch.cat([theirs[n].flatten() for n in theirs if "lora_B" in n])
        apart = torch.cat([(mine[n] - theirs[n]).flatten() for n in theirs if "lora_B" in n])
        assert apart.norm() < 0.01 * moved.norm()


def test_company_does_not_show_in_the_dropout(make_room: MakeRoom) -> None:
    """The masks are the member's own: without dropout the adapter is another one."""
    room = make_room(dropout=0.3)
    job = room.job("sea", 4)
    room.train(job)
    dropped = room.weights(job)
    room = make_room()
    room.train(job := room.job("sea", 4, root="plain"))
    plain = room.weights(job)
    assert any((plain[name] - dropped[name]).abs().max() > 1e-3 for name in plain)


def cut_off(room: Room, cohort: Cohort, after: int) -> list[JobItem]:
    """Run a cohort as by an actor that is killed once so many steps are reported."""
    taken, items = 0, []
    for item in room.run(cohort):
        items.append(item)
        taken += isinstance(item, StepTaken)
        if taken == after:
            return items
    raise AssertionError("it ended before")


@pytest.mark.parametrize("after", [1, 2, 7, 9, 10, 13, 15])
def test_a_resumed_cohort_ends_in_the_same_bits(make_room: MakeRoom, after: int) -> None:
    """Dropout, accumulation and early stopping; from the 10th report on one member has finished."""
    room = make_room(dropout=0.1, gradient_accumulation=2, batch_rows=1, sequence_length=64)
    jobs = [room.job("sea", 12), room.job("kitchen", 3), room.job("code", 12)]
    undisturbed = [replace(job, root=Storage(room.path / "undisturbed")) for job in jobs]
    room.train(*undisturbed)
    cohort = room.cohort(*jobs, checkpoint_s=1e-9)
    before = cut_off(room, cohort, after)
    other = make_room(dropout=0.1, gradient_accumulation=2, batch_rows=1, sequence_length=64)
    items = list(other.run(cohort))
    if after > 2:
        first = next(item for item in items if isinstance(item, StepTaken))
        assert first.step > 1, "it went on from the checkpoint"
    if after >= 10:
        assert "expert-0001" in results(before)
    for job, reference in zip(jobs, undisturbed, strict=True):
        assert room.bytes_of(job) == room.bytes_of(reference)
        mine, theirs = job.finished(), reference.finished()
        assert mine is not None
        assert theirs is not None
        assert (mine.loss_curve, mine.heldout_curve) == (theirs.loss_curve, theirs.heldout_curve)
        assert mine.tokens_seen == theirs.tokens_seen
    assert cohort.checkpoints.names() == []


def test_a_part_goes_on_from_the_whole_cohorts_checkpoint(make_room: MakeRoom) -> None:
    room = make_room()
    cohort = room.cohort(room.job("sea", 6), room.job("kitchen", 6), checkpoint_s=1e-9)
    cut_off(room, cohort, 8)
    part = cohort.only(["expert-0001"])
    assert part.members == ("expert-0001",)
    items = list(room.run(part))
    assert next(item.step for item in items if isinstance(item, StepTaken)) == 4
    assert results(items).keys() == {"expert-0001"}
    assert cohort.checkpoints.names() == [f"{cohort.digest}.safetensors"], "the other needs it"
    items = list(room.run(cohort.only(["expert-0000"])))
    assert next(item.step for item in items if isinstance(item, StepTaken)) == 4
    assert cohort.checkpoints.names() == [], "the last part leaves nothing of the whole"


def test_the_parts_of_a_part_leave_nothing(make_room: MakeRoom) -> None:
    room = make_room()
    cohort = room.cohort(*(room.job(topic, 6) for topic in TOPICS), checkpoint_s=1e-9)
    cut_off(room, cohort, 6)
    pair = cohort.only(["expert-0000", "expert-0001"])
    cut_off(room, pair, 4)
    firsts = []
    for member in cohort.members:
        part = (pair if member in pair.members else cohort).only([member])
        firsts.append(next(i.step for i in room.run(part) if isinstance(i, StepTaken)))
        list(room.run(part))
    assert firsts == [3, 3, 2], "each from the last checkpoint that it was in"
    assert cohort.checkpoints.names() == []


def test_finished_members_are_not_trained_again(make_room: MakeRoom) -> None:
    room = make_room()
    jobs = [room.job("sea", 3), room.job("kitchen", 3)]
    first = results(room.train(jobs[0]))
    items = room.train(*jobs)
    assert {item.id for item in items if isinstance(item, StepTaken)} == {"expert-0001"}
    assert results(items)["expert-0000"] == first["expert-0000"]


def spoil(room: Room, cohort: Cohort, slot: int, step: int) -> Iterator[JobItem]:
    """Run a cohort, one slot of which is filled with NaN after a step of all its members."""
    for item in room.run(cohort):
        yield item
        if isinstance(item, StepTaken) and (item.id, item.step) == (cohort.members[-1], step):
            values = torch.full_like(room.bench.adapter.state(slot), float("nan"))
            room.bench.adapter.set_state(slot, values)


def until(items: Iterator[JobItem], member: str, step: int) -> None:
    """Go on until a member has taken a step."""
    for item in items:
        if isinstance(item, StepTaken) and (item.id, item.step) == (member, step):
            return


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_member_that_diverges_leaves_the_others_alone(
    make_room: MakeRoom, precision: str
) -> None:
    room = make_room(evaluations=1, patience=0, precision=precision)
    jobs = [room.job(topic, 7) for topic in TOPICS]
    items = list(spoil(room, room.cohort(*jobs), slot=1, step=3))
    cause = failures(items)["expert-0001"]
    assert isinstance(cause, DivergedError)
    assert "step 4 of 7" in str(cause)
    assert "experts.learning_rate" in str(cause)
    assert results(items).keys() == {"expert-0000", "expert-0002"}
    # the very step in which the rows of the failed one were no numbers: the others' bits
    states = {}
    for root in ("healthy", "spoilt"):
        again = room.cohort(*(replace(job, root=Storage(room.path / root)) for job in jobs))
        run = spoil(room, again, slot=1, step=3) if root == "spoilt" else room.run(again)
        until(run, "expert-0002", 4)
        states[root] = [room.bench.adapter.state(slot) for slot in (0, 2)]
    for spoilt, healthy in zip(states["spoilt"], states["healthy"], strict=True):
        assert torch.equal(spoilt, healthy)
    # and in the end: the bits of a cohort whose second member left at that step by itself
    leaving = [
        replace(job, root=Storage(room.path / "leaving"), steps=4 if job is jobs[1] else 7)
        for job in jobs
    ]
    room.train(*leaving)
    for index in (0, 2):
        assert room.bytes_of(jobs[index]) == room.bytes_of(leaving[index])


def test_a_shard_that_cannot_be_read_fails_alone(make_room: MakeRoom) -> None:
    room = make_room()
    missing = room.job("sea", 2, shards=(Shard(Storage(room.path), "gone.jsonl", "0" * 64),))
    empty = room.job("code", 2, shards=(write_shard(Storage(room.path), "empty.jsonl", []),))
    items = room.train(missing, room.job("kitchen", 2), empty)
    assert results(items).keys() == {"expert-0001"}
    causes = failures(items)
    assert "gone.jsonl is missing" in str(causes["expert-0000"])
    assert "holds no document" in str(causes["expert-0002"])


def test_a_directory_that_cannot_be_written_fails_alone(make_room: MakeRoom) -> None:
    room = make_room()
    (room.path / "occupied").write_text("a file where a directory should be")
    items = room.train(room.job("sea", 2, root="occupied/experts"), room.job("kitchen", 2))
    assert results(items).keys() == {"expert-0001"}
    assert "cannot be written" in str(failures(items)["expert-0000"])


def test_training_goes_on_without_a_checkpoint(
    make_room: MakeRoom, caplog: pytest.LogCaptureFixture
) -> None:
    room = make_room()
    (room.path / "checkpoints").write_text("a file where a directory should be")
    assert results(list(room.run(room.cohort(room.job("sea", 3), checkpoint_s=1e-9))))
    assert "training goes on" in caplog.text


def test_early_stopping_keeps_the_best_values(make_room: MakeRoom) -> None:
    room = make_room(evaluations=10, patience=2, weight_decay=0.0)
    job = room.job("sea", 60, learning_rate=0.5)
    items = room.train(job, room.job("kitchen", 20))
    result = results(items)["expert-0000"]
    losses = [item.loss for item in items if isinstance(item, Measured) and item.id == job.id]
    assert [point.loss for point in result.heldout_curve] == losses
    assert result.stopped_early
    assert result.steps < 60
    best = min(result.heldout_curve, key=lambda point: point.loss)
    assert result.best_step == best.step < result.steps
    assert losses[-2:] == sorted(losses[-2:], reverse=False) or min(losses[-2:]) >= best.loss
    # the values are those that the same job has after `best_step` steps
    reference = make_room(evaluations=10, patience=2)
    for item in reference.run(reference.cohort(replace(job, root=Storage(room.path / "twin")))):
        if isinstance(item, Measured) and item.step == best.step:
            break
    reference.bench.adapter.save(0, room.path / "best")
    saved = load_file(room.path / "best" / "adapter_model.safetensors")
    for name, value in room.weights(job).items():
        torch.testing.assert_close(value, saved[name], rtol=0, atol=1e-5)


def test_evaluations_read_little_and_none_happen_without_text(make_room: MakeRoom) -> None:
    room = make_room(evaluations=3)
    items = room.train(room.job("sea", 30), room.job("code", 30, heldout=()))
    steps = [(item.id, item.step) for item in items if isinstance(item, Measured)]
    assert steps == [("expert-0000", 10), ("expert-0000", 20), ("expert-0000", 30)]
    blind = results(items)["expert-0002"]
    assert (blind.heldout_curve, blind.heldout_loss_expert) == ([], None)
    assert (blind.best_step, blind.stopped_early) == (30, False)


def test_a_shared_start(make_room: MakeRoom) -> None:
    room = make_room(evaluations=1)
    general = results(room.train(room.job("code", 10, id="shared")))["shared"]
    initial = InitialAdapter(Storage(room.path / "experts"), "shared", general.digest)
    job = room.job("sea", 1, init=initial, learning_rate=1e-12)
    result = results(room.train(job))[job.id]
    assert result.init == general.digest
    assert result.digest != room.job("sea", 1, learning_rate=1e-12).digest
    shared = load_file(room.path / "experts" / "shared" / "adapter_model.safetensors")
    for name, value in room.weights(job).items():
        torch.testing.assert_close(value, shared[name], rtol=0, atol=1e-6)
    stale = room.job("kitchen", 1, init=replace(initial, digest="0" * 64))
    gone = room.job("code", 1, init=replace(initial, name="nothing"))
    causes = failures(room.train(stale, gone))
    assert "not the adapter to start from" in str(causes["expert-0001"])
    assert "cannot be loaded" in str(causes["expert-0002"])


def test_a_card_of_provenance(make_room: MakeRoom) -> None:
    room = make_room()
    result = results(room.train(room.job("sea", 4)))["expert-0000"]
    assert result.shards == [room.shards["sea"].sha256]
    assert result.heldout_shards == [room.heldout["sea"].sha256]
    assert (result.base_digest, result.tokenizer_digest) == ("b" * 64, "c" * 64)
    assert ExpertsConfig.model_validate(result.config) == room.experts
    assert result.init == "scratch"
    assert result.heldout_loss_base is not None
    assert result.heldout_loss_expert is not None
    assert result.documents == 24
    assert result.seconds > 0
    assert room.bench.computing.seconds > 0
