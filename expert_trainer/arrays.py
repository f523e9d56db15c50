"""Arrays on local disk, mapped into memory: as large as the disk, and evicted under pressure.

Knows nothing of what they hold.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def allocate(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A new array of zeros, whose room on disk is taken at once.

    Writing to a mapped file whose disk is full would kill the process without a word.

    Raises:
        OSError: the disk has not the room.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size == 0:
        return np.zeros(shape, dtype)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return np.memmap(path, dtype, "r+", shape=shape)
