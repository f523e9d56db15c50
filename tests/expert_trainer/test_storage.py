"""Every property on a local directory, on a file server and on an object store's semantics."""

import errno
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_trainer import remote
from expert_trainer.errors import StorageError
from expert_trainer.remote import Remote
from expert_trainer.storage import Storage, as_storage

KINDS = ["disk", "ftp", "memory"]


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "disk":
        return Storage(tmp_path / "storage")
    if request.param == "ftp":
        return Storage(request.getfixturevalue("ftp_url"))
    return Storage(f"memory://{tmp_path}")


@pytest.fixture(params=["disk", "ftp"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """One that other processes reach too."""
    if request.param == "disk":
        return Storage(tmp_path / "storage")
    return Storage(request.getfixturevalue("ftp_url"))


def make_tree(directory: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


def read_tree(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_what_is_written_is_read_and_replaced(storage: Storage) -> None:
    storage.make()
    storage.write("a/b/file", b"one")
    assert storage.read("a/b/file") == b"one"
    storage.write("a/b/file", b"another")
    assert storage.read("a/b/file") == b"another"
    storage.write("empty", b"")
    assert storage.read("empty") == b""
    assert storage.names() == ["a", "empty"]
    assert storage.names("a") == ["b"]
    assert (storage / "a" / "b").read("file") == b"another"
    assert (storage / "a").files() == {"b/file": 7}


def test_nothing_is_there_before_anything_is_written(storage: Storage) -> None:
    assert not storage.exists("file")
    assert storage.names() == []
    assert storage.names("deep/er") == []
    assert storage.files() == {}
    storage.remove("file")
    storage.remove("deep/er")
    storage.sweep()
    with pytest.raises(FileNotFoundError):
        storage.read("file")
    with pytest.raises(FileNotFoundError):
        storage.read("deep/er/file")


def test_making_leaves_nothing_behind(storage: Storage) -> None:
    storage.make()
    storage.make()
    assert storage.files() == {}


def test_files_and_directories_are_removed(storage: Storage) -> None:
    for name in ("x/1", "x/y/2", "z"):
        storage.write(name, b"content")
    assert storage.exists("x")
    assert storage.exists("x/y/2")
    storage.remove("x")
    assert not storage.exists("x/y/2")
    assert storage.files() == {"z": 7}
    storage.remove("z")
    assert not storage.exists("z")
    storage.write("x/1", b"back")
    assert storage.files() == {"x/1": 4}


def test_large_files_pass_through(storage: Storage, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (tmp_path / "large").write_bytes(content)
    storage.put_file(tmp_path / "large", "here/large")
    assert storage.read("here/large") == content
    storage.get_file("here/large", tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == content
    with pytest.raises(FileNotFoundError):
        storage.get_file("here/none", tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "storage") == [
        "deep",
        "large",
    ]


def test_a_tree_replaces_the_one_before_it(storage: Storage, tmp_path: Path) -> None:
    first = make_tree(tmp_path / "first", {"done": b"1", "a": b"old", "sub/b": b"stray"})
    second = make_tree(tmp_path / "second", {"done": b"2", "a": b"new"})
    storage.put_tree(first, "experts/one", marker="done")
    assert read_tree(first) == {"done": b"1", "a": b"old", "sub/b": b"stray"}
    storage.get_tree("experts/one", tmp_path / "copy")
    assert read_tree(tmp_path / "copy") == read_tree(first)
    storage.put_tree(second, "experts/one", marker="done")
    storage.get_tree("experts/one", tmp_path / "copy")
    assert read_tree(tmp_path / "copy") == read_tree(second)
    assert storage.names("experts") == ["one"]
    with pytest.raises(FileNotFoundError):
        storage.get_tree("experts/two", tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_names_and_files_hide_what_is_not_whole_and_sweeping_removes_it(storage: Storage) -> None:
    storage.write("kept", b"1")
    storage.write(".staged-dead", b"half")
    storage.write("below/.staged-dead", b"half")
    storage.write(".staged-tree/file", b"half")
    assert storage.names() == ["below", "kept"]
    assert storage.files() == {"kept": 1}
    storage.sweep()
    assert not storage.exists(".staged-dead")
    assert not storage.exists(".staged-tree")
    assert storage.exists("below/.staged-dead")
    storage.sweep("below")
    assert not storage.exists("below/.staged-dead")
    assert storage.read("kept") == b"1"


def test_it_travels_between_processes_with_its_password(shared: Storage) -> None:
    shared.write("file", b"far")
    copy = pickle.loads(pickle.dumps(shared))
    assert copy == shared
    assert hash(copy) == hash(shared)
    assert copy.url == shared.url
    program = "import pickle, sys; print(pickle.load(sys.stdin.buffer).read('file').decode())"
    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(shared), capture_output=True, check=True
    )
    assert done.stdout == b"far\n"


def test_a_forked_child_has_connections_of_its_own(shared: Storage) -> None:
    shared.write("file", b"before")
    child = os.fork()
    if child == 0:
        os._exit(0 if shared.read("file") == b"before" else 1)
    for _ in range(20):
        assert shared.read("file") == b"before"
    assert os.waitpid(child, 0)[1] == 0


def test_threads_share_it(storage: Storage) -> None:
    def work(number: int) -> bool:
        place = storage / f"thread-{number % 4}"
        content = bytes([number]) * 70_000
        place.write(f"file-{number}", content)
        return place.read(f"file-{number}") == content and f"file-{number}" in place.names()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(48)))
    assert len(storage.files()) == 48


WRITER = """
import pickle, sys
storage = pickle.load(sys.stdin.buffer)
number = 0
while True:
    number = (number + 1) % 256
    storage.write("file", bytes([number]) * 400_000)
    print(number, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.004, 0.011])
def test_a_reader_never_meets_half_a_file_of_a_writer_that_is_killed(
    shared: Storage, delay: float
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(pickle.dumps(shared))
        process.stdin.close()
        process.stdout.readline()
        for _ in range(10):
            content = shared.read("file")
            assert (len(content), len(set(content))) == (400_000, 1)
        time.sleep(delay)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    content = shared.read("file")
    assert (len(content), len(set(content))) == (400_000, 1)
    assert shared.names() == ["file"]
    deadline = time.monotonic() + 60
    shared.sweep()
    while list(shared.files()) != ["file"]:  # a server notices the end of an upload by itself
        assert time.monotonic() < deadline, list(shared.files())
        time.sleep(0.05)
        shared.sweep()


def test_a_tree_has_its_marker_only_once_it_is_whole(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_tree(tmp_path / "old", {"a-marker": b"old", "b": b"old", "c": b"old"})
    new = make_tree(tmp_path / "new", {"a-marker": b"new", "b": b"new", "c": b"new"})
    storage.put_tree(old, "tree", marker="a-marker")
    upload, copy, seen = Remote.upload, shutil.copyfile, []

    def failing_upload(self: Remote, source: Path, name: str) -> None:
        seen.append((name, storage.exists("tree/a-marker")))
        failing_copy(source, None)
        upload(self, source, name)

    def failing_copy(source: Path, target: Path | None) -> None:
        if source.name == "c":
            raise OSError(errno.EIO, "the cable is out")
        if target:
            copy(source, target)

    monkeypatch.setattr(Remote, "upload", failing_upload)
    monkeypatch.setattr(shutil, "copyfile", failing_copy)
    with pytest.raises(StorageError, match="the cable is out"):
        storage.put_tree(new, "tree", marker="a-marker")
    if storage.path is None:
        assert seen == [("tree/b", False), ("tree/c", False)]
        assert not storage.exists("tree/a-marker")
    else:
        assert storage.read("tree/c") == b"old"
    assert storage.names() == ["tree"]


def test_writers_of_one_tree_leave_one_of_theirs(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "storage")
    trees = [
        make_tree(tmp_path / f"source-{number}", dict.fromkeys(("a", "b"), bytes([number])))
        for number in range(4)
    ]

    def put(number: int) -> None:
        for _ in range(10):
            storage.put_tree(trees[number], "tree", marker="a")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put, range(4)))
    assert storage.read("tree/a") == storage.read("tree/b")
    assert list(storage.files()) == ["tree/a", "tree/b"]
    assert [path.name for path in (tmp_path / "storage").iterdir()] == ["tree"]


def test_a_file_and_a_tree_take_each_others_name(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "storage")
    tree = make_tree(tmp_path / "source", {"a": b"1"})
    storage.put_tree(tree, "name", marker="a")
    storage.write("name", b"file")
    assert storage.read("name") == b"file"
    storage.put_tree(tree, "name", marker="a")
    assert storage.files() == {"name/a": 1}


def test_many_directories_of_a_server_share_a_connection(ftp_url: str) -> None:
    root = Storage(ftp_url)
    root.write("file", b"1")
    kept = dict(remote._CONNECTIONS.open)
    children = [root / f"child-{number}" for number in range(30)]
    for child in children:
        child.write("file", b"2")
        assert pickle.loads(pickle.dumps(child)).read("file") == b"2"
    assert kept == remote._CONNECTIONS.open


NAMES = st.text("ab-_.0 é#?", min_size=1, max_size=6).filter(lambda name: set(name) - set(". "))


@given(files=st.dictionaries(NAMES, st.binary(max_size=40), min_size=1, max_size=4))
@settings(max_examples=15)
def test_any_tree_comes_back_as_it_went(storage: Storage, files: dict[str, bytes]) -> None:
    files = {f"{name}/{name}": content for name, content in files.items()}
    storage.put_files(files, "tree", marker=max(files))
    with tempfile.TemporaryDirectory() as folder:
        storage.get_tree("tree", Path(folder) / "copy")
        assert read_tree(Path(folder) / "copy") == files


def full_disk(storage: Storage, limit: int) -> str:
    """What a process that may write no file larger than `limit` bytes is told."""
    program = (
        "import pickle, sys\n"
        "from expert_trainer.errors import StorageError\n"
        "storage = pickle.load(sys.stdin.buffer)\n"
        "try: storage.write('file', b'x' * 200_000)\n"
        "except StorageError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps(storage),
        capture_output=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    return done.stdout.decode().strip()


def test_a_full_disk_leaves_the_file_before_it(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write("file", b"before")
    assert full_disk(storage, 100_000) == (
        f"{tmp_path} cannot be written to (no space left); make room there, "
        "then give the same command again"
    )
    assert storage.read("file") == b"before"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_full_disk_of_a_server(
    start_ftp: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        storage = Storage(start_ftp(tmp_path))  # inherits the limit
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    storage.write("file", b"before")
    with pytest.raises(StorageError, match="cannot be written to") as refusal:
        storage.write("file", b"x" * 200_000)
    assert "open-sesame" not in str(refusal.value)
    assert storage.read("file") == b"before"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    storage = Storage(tmp_path / "file" / "below")
    with pytest.raises(StorageError, match=r"file/below cannot be written to \(Not a directory\)"):
        storage.make()
    with pytest.raises(FileNotFoundError):
        storage.read("anything")
    assert not storage.exists("anything")
    with pytest.raises(StorageError, match="/proc cannot be written to"):
        Storage("/proc").make()
    with pytest.raises(StorageError, match="Is a directory"):
        Storage(tmp_path.parent).read(tmp_path.name)


def test_a_connection_that_the_server_gave_up_is_made_again(
    start_ftp: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "IDLE_S", 0.2)
    storage = Storage(start_ftp(tmp_path, idle_timeout_s=0.3))
    actions: list[Callable[[], object]] = [
        lambda: storage.read("file"),
        storage.names,
        storage.files,
        lambda: storage.exists("file"),
        lambda: storage.write("file", b"again"),
        lambda: storage.get_file("file", tmp_path.parent / "copy"),
        lambda: storage.remove("other"),
    ]
    storage.write("file", b"again")
    expected = [b"again", ["file"], {"file": 5}, True, None, None, None]
    for action, result in zip(actions, expected, strict=True):
        time.sleep(0.6)
        assert action() == result


def test_an_unreachable_server_is_named_without_its_password() -> None:
    storage = Storage("ftp://somebody:hush-hush@127.0.0.1:9/dir")
    for action in (storage.make, storage.names, lambda: storage.exists("x")):
        with pytest.raises(StorageError) as refusal:
            action()
        text = str(refusal.value)
        assert "ftp://somebody:***@127.0.0.1:9/dir cannot be" in text
        assert "Connection refused" in text
        assert "see that the server can be reached" in text


def test_a_refused_password_appears_nowhere(ftp_server: tuple[str, Path]) -> None:
    url = ftp_server[0].replace("open-sesame", "p%40ss@word")
    storage = Storage(f"{url}/dir")
    with pytest.raises(StorageError) as refusal:
        storage.write("file", b"")
    shown = f"{refusal.value} {refusal.value!r} {storage} {storage!r} {refusal.value.__cause__!r}"
    assert "word" not in shown.replace("password", "")
    assert "introvert:***@" in str(storage)


def test_an_unknown_scheme_names_the_remedy() -> None:
    with pytest.raises(StorageError, match=r"nosuch.* install the fsspec driver of its scheme"):
        Storage("nosuch://host/dir").make()
    with pytest.raises(StorageError, match="is no URL"):
        Storage("ftp://[half/dir")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("runs/a/", "runs/a"),
        ("/", "/"),
        ("file:///data/x", "/data/x"),
        ("file:///", "/"),
        ("memory://", "memory://"),
        ("s3://bucket/", "s3://bucket"),
    ],
)
def test_one_directory_has_one_name(given: str, expected: str) -> None:
    assert Storage(given).url == expected
    assert as_storage(given) == as_storage(Storage(expected))


def test_the_root_of_a_store_is_a_directory_too() -> None:
    Storage("memory://").write("root-file", b"1")
    assert Storage("memory://").read("root-file") == b"1"
    assert (Storage("memory://") / "x").url == "memory://x"
    Storage("memory://").remove("root-file")


@given(st.text("abc:/?@%", max_size=12), st.text("uvw-", max_size=5))
def test_no_password_survives_redaction(password: str, user: str) -> None:
    from urllib.parse import quote

    url = f"ftp://{user}:{quote('SECRET' + password, safe='')}@host:21/dir"
    assert "SECRET" not in str(Storage(url))
    assert str(Storage(url)) == f"ftp://{user}:***@host:21/dir"


def test_writers_of_one_file_never_mix(shared: Storage) -> None:
    def write(number: int) -> None:
        for _ in range(5):
            shared.write("file", bytes([number]) * 100_000)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = shared.read("file")
    assert (len(content), len(set(content))) == (100_000, 1)
    assert list(shared.files()) == ["file"]
