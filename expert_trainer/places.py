"""Where a run writes: tried out before any work, and locked against a second run.

Knows nothing of what is written.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.schema import BundleConfig
from expert_trainer.errors import PlaceError, RunningError, StorageError
from expert_trainer.storage import Storage

LOCK_FILE = ".run.lock"


def require_places(config: BundleConfig) -> None:
    """Make the bundle's, the working and the scratch directory, and try writing to each.

    Raises:
        PlaceError: one that cannot be made or written to.
    """
    places: dict[str, str | Path] = {
        "path": config.path,
        "work_dir": config.work,
        "scratch_dir": config.scratch,
    }
    for key, name in places.items():
        place = Storage(name)
        try:
            place.make()
        except StorageError as error:
            raise PlaceError(
                f"{place} cannot be written to ({error.reason}); "
                f"name another directory in bundle.{key}, or see to its permissions",
                reason=error.reason,
            ) from None


@contextmanager
def run_lock(config: BundleConfig) -> Iterator[None]:
    """Keep others from running on the same directory of this machine while the context lasts.

    The system releases the lock of a process that dies, however it dies. Inside another such
    context of the same process this does nothing.

    Raises:
        RunningError: another process has it.
        PlaceError: the scratch directory cannot be written to.
    """
    path = config.scratch / LOCK_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise PlaceError(
            f"{config.scratch} cannot be written to ({error.strerror}); "
            "name another directory in bundle.scratch_dir, or see to its permissions"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            if holder == str(os.getpid()):  # ours already, further up
                yield
                return
            raise RunningError(
                f"process {holder} is at work in {config.scratch}; wait for its end, end it, or "
                "name another directory in bundle.work_dir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)
