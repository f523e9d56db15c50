import errno
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_trainer.arrays import allocate
from expert_trainer.corpus import content_hash
from expert_trainer.errors import StorageError
from expert_trainer.spool import Spool, SpoolWriter, scratch_directory
from expert_trainer.types import Document

CHAT = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi\u2028\x85\r\n"})

documents = st.lists(
    st.one_of(
        st.builds(Document, id=st.text(min_size=1), text=st.text(min_size=1)),
        st.builds(Document, id=st.text(), text=st.text(min_size=1), prompt=st.text(min_size=1)),
        st.builds(Document, id=st.text(), messages=st.just(CHAT)),
    ),
    max_size=20,
)


def spooled(directory: Path, *parts: list[Document]) -> tuple[Spool, list[list[int]]]:
    with SpoolWriter(directory) as writer:
        numbers = [writer.extend(iter(part)).tolist() for part in parts]
    return writer.spool, numbers


@given(documents, documents, st.randoms())
def test_what_goes_in_comes_out_by_number(
    tmp_path_factory: pytest.TempPathFactory,
    one: list[Document],
    two: list[Document],
    order: random.Random,
) -> None:
    spool, numbers = spooled(tmp_path_factory.mktemp("spool"), one, two)
    everything = one + two
    assert numbers == [list(range(len(one))), list(range(len(one), len(everything)))]
    assert len(spool) == len(everything)
    assert list(spool.documents()) == everything
    some = [number for number in range(len(everything)) if order.random() < 0.5]
    order.shuffle(some)
    assert list(spool.documents(some)) == [everything[number] for number in some]
    hashes = [row.tobytes() for row in np.asarray(spool.hashes)]
    assert hashes == [content_hash(document) for document in everything]


def test_a_scratch_directory_is_gone_afterwards(tmp_path: Path) -> None:
    with scratch_directory(tmp_path / "work") as scratch:
        (scratch / "file").write_text("content")
    with pytest.raises(KeyError), scratch_directory(tmp_path / "work"):
        raise KeyError
    assert list((tmp_path / "work").iterdir()) == []


HOLD = """
import sys, time
from pathlib import Path
from expert_trainer.spool import scratch_directory
with scratch_directory(Path(sys.argv[1])) as scratch:
    print(scratch, flush=True)
    time.sleep(60)
"""


def test_directories_of_the_killed_are_swept_and_those_of_others_left(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        with scratch_directory(tmp_path):
            assert theirs.exists(), "at work"
        other.kill()
        other.wait()
        assert theirs.exists(), "nobody cleaned up"
        with scratch_directory(tmp_path) as mine:
            assert list(tmp_path.iterdir()) == [mine]


def test_a_full_disk_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"bundle\.scratch_dir"), scratch_directory(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_array_takes_its_room_at_once(tmp_path: Path) -> None:
    array = allocate(tmp_path / "array", np.float32, (1000, 3))
    array[999] = 1
    assert (tmp_path / "array").stat().st_blocks * 512 >= 12_000
    assert np.array_equal(np.memmap(tmp_path / "array", np.float32, "r")[-3:], [1, 1, 1])
    assert allocate(tmp_path / "none", np.float32, (0, 3)).shape == (0, 3)
    with pytest.raises(OSError, match=r"space|large|argument"):
        allocate(tmp_path / "huge", np.float32, (1 << 44,))
