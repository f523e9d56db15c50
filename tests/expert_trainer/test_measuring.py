import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs.manifest import FileEntry
from configs.schema import RunConfig
from expert_trainer.errors import DamagedBundleError
from expert_trainer.hashed import HashedDirectory
from expert_trainer.job import Outcome
from expert_trainer.measure import document_losses
from expert_trainer.measuring import MeasureJob, SavedAdapter
from expert_trainer.shards import Shard, write_shard
from expert_trainer.storage import Storage
from expert_trainer.types import Document
from expert_trainer.workbench import Workbench

DOCUMENTS = [
    Document(id="sea", text="the boat and the tide of the harbour"),
    Document(id="kitchen", text="flour and butter with salt from the oven"),
    Document(id="one", text="sea"),
]


@pytest.fixture
def bench(make_config: Callable[..., RunConfig]) -> Workbench:
    return Workbench(make_config())


@pytest.fixture
def shard(ftp_url: str) -> Shard:
    return write_shard(Storage(ftp_url), "documents.jsonl", DOCUMENTS)


def save_adapter(bench: Workbench, place: Storage, tmp_path: Path) -> SavedAdapter:
    bench.adapter.reset(0, seed=3)
    bench.adapter.parameter(0).data.normal_(std=0.3)
    bench.adapter.settle(0)
    bench.adapter.save(0, tmp_path / "saved")
    place.put_tree(tmp_path / "saved", "adapter", marker="adapter_config.json")
    files = tuple(
        FileEntry(
            path=path.name,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            bytes=path.stat().st_size,
        )
        for path in sorted((tmp_path / "saved").iterdir())
    )
    return SavedAdapter(HashedDirectory(place / "adapter", files), tmp_path / "copies" / "adapter")


def measure(job: MeasureJob, bench: Workbench) -> np.ndarray:
    travelled = pickle.loads(pickle.dumps(job))
    (outcome,) = travelled.run(bench, travelled.read(bench))
    assert isinstance(outcome, Outcome)
    assert (outcome.id,) == job.members
    losses: np.ndarray = outcome.value
    return losses


def test_an_adapter_behind_a_url_is_copied_and_measured(
    bench: Workbench, shard: Shard, ftp_url: str, tmp_path: Path
) -> None:
    adapter = save_adapter(bench, Storage(ftp_url), tmp_path)
    with bench.adapter.using([0]):
        expected = document_losses(bench.model, bench.examples((shard,)), 64, 4)
    bench.adapter.reset(0, seed=4)
    with_adapter = measure(MeasureJob("measure x", adapter, shard, 64, 4), bench)
    alone = measure(MeasureJob("measure base", None, shard, 64, 4), bench)
    np.testing.assert_allclose(with_adapter, expected, rtol=1e-5)
    assert alone.shape == (3, 2)
    assert np.array_equal(alone[:, 1], expected[:, 1])
    assert abs(alone[:, 0] - expected[:, 0]).max() > 0.1
    assert sorted(path.name for path in adapter.copy.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert bench.computing.seconds > 0


def test_a_damaged_adapter_is_not_measured(
    bench: Workbench, shard: Shard, ftp_url: str, tmp_path: Path
) -> None:
    adapter = save_adapter(bench, Storage(ftp_url), tmp_path)
    Storage(ftp_url).write("adapter/adapter_config.json", b"{}")
    with pytest.raises(DamagedBundleError, match=r"adapter_config\.json"):
        MeasureJob("measure x", adapter, shard, 64, 4).read(bench)


def test_its_only_member_is_itself(shard: Shard) -> None:
    job = MeasureJob("measure base", None, shard, 64, 4)
    assert job.members == ("measure base",)
    assert job.only(["measure base"]) == job
    assert (job.steps, job.steps_of("measure base")) == (1, 1)
