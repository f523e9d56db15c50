"""A router on disk: `router.json`, `centroids.safetensors` and, with students, their arrays in
`student.safetensors` and `encoder.safetensors`; nothing pickled.

Knows nothing of how a router is fitted or used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from configs.schema import RouterConfig
from router.calibration import Calibration
from router.cascade import StudentRecord
from router.errors import RouterFormatError
from router.quantization import ROUNDING, levels_here

FORMAT = 1
RECORD_FILE = "router.json"
CENTROIDS_FILE = "centroids.safetensors"
STUDENT_FILE = "student.safetensors"
ENCODER_FILE = "encoder.safetensors"
CENTROIDS = "centroids"
UNIT_TOLERANCE = 1e-3
MOST_DOUBTED = 0.2
"""Share of texts: more, and all in 32 bits would be about as fast."""
REMEDY = "run `introvert fit` again, or publish the bundle anew"


class Quantized(BaseModel):
    """What computing the embedder in 8 bits does to routes, measured at fit time."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    texts: int
    """Measured on."""
    agreement: float
    """Share of them with the expert, or abstention, that 32 bits give; what is doubted counts."""
    doubted: float = 0.0
    """Share of them whose decision was so close that it is made again in 32 bits."""
    lead: float = 0.0
    """Up to which a decision is that close: a lead over the runner-up, or a distance from the
    threshold of abstention."""
    levels: int = 0
    """Of a weight in 8 bits; what another processor rounds otherwise was not measured."""
    rounding: int = 0
    """Number of the way in which was rounded."""


class RouterRecord(BaseModel):
    """`router.json`: everything of a router but its centroids."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    format: Literal[1] = 1
    embedder: str
    """Name or path of the embedding model."""
    embedder_digest: str
    """What the centroids were measured with; another embedder would make nonsense of them."""
    dimension: int
    clusters: int
    config: RouterConfig
    calibration: Calibration
    seed: int
    student: StudentRecord | None = None
    """Of the student, where it has one."""
    encoder: StudentRecord | None = None
    """Of the second student, where it has one."""
    quantized: Quantized | None = None
    """Of the embedder in 8 bits, where that was measured."""

    @property
    def may_be_quantized(self) -> bool:
        """Whether the embedder can be served in 8 bits here: it routes enough texts as in 32, few
        of them twice."""
        least = self.config.quantized_agreement
        found = self.quantized
        return (
            least is not None
            and found is not None
            and found.agreement >= least
            and found.doubted <= MOST_DOUBTED
            and (found.rounding, found.levels) == (ROUNDING, levels_here())
        )

    @property
    def doubted_lead(self) -> float:
        """Lead up to which what was decided in 8 bits is decided again in 32."""
        return self.quantized.lead if self.quantized else 0.0


Arrays = Mapping[str, npt.NDArray[Any]]
"""The arrays of a student by name."""


def write_router(
    directory: Path,
    record: RouterRecord,
    centroids: npt.NDArray[np.float32],
    student: Arrays | None = None,
    encoder: Arrays | None = None,
) -> None:
    """Write the files, each by rename, the record last; the same router gives the same bytes.

    Args:
        directory: made if missing.
        record: what goes with the centroids.
        centroids: shape (K, D), rows of unit length.
        student: the arrays of the student whose settings the record has.
        encoder: those of the second one, likewise.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _write_arrays(directory / CENTROIDS_FILE, {CENTROIDS: centroids})
    for name, arrays in ((STUDENT_FILE, student), (ENCODER_FILE, encoder)):
        if arrays is None:
            (directory / name).unlink(missing_ok=True)
        else:
            _write_arrays(directory / name, arrays)
    temporary = directory / f".{RECORD_FILE}.{os.getpid()}"
    temporary.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    temporary.replace(directory / RECORD_FILE)


def read_router(directory: Path) -> tuple[RouterRecord, npt.NDArray[np.float32]]:
    """Read what `write_router` wrote; the centroids have shape (K, D).

    Raises:
        RouterFormatError: a file is missing or damaged, of another format, or the two disagree.
    """
    try:
        record = _parse(directory, (directory / RECORD_FILE).read_bytes())
        centroids = load_file(directory / CENTROIDS_FILE)[CENTROIDS]
    except FileNotFoundError as error:
        missing = Path(error.filename).name if error.filename else CENTROIDS_FILE
        raise RouterFormatError(
            f"no router in {directory}: {missing} is missing; {REMEDY}"
        ) from None
    except OSError as error:
        raise RouterFormatError(f"the router in {directory} cannot be read: {error}") from None
    except (SafetensorError, KeyError):
        raise RouterFormatError(f"{directory / CENTROIDS_FILE} is damaged; {REMEDY}") from None
    _check(directory, record, centroids)
    return record, centroids


def read_student(directory: Path, name: str = STUDENT_FILE) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a student of a router that has one.

    Args:
        directory: of the router.
        name: of the student's file.

    Raises:
        RouterFormatError: they are missing or damaged.
    """
    try:
        arrays: dict[str, npt.NDArray[Any]] = load_file(directory / name)
    except FileNotFoundError:
        raise RouterFormatError(
            f"no whole router in {directory}: {name} is missing; {REMEDY}"
        ) from None
    except OSError as error:
        raise RouterFormatError(f"the router in {directory} cannot be read: {error}") from None
    except SafetensorError:
        raise RouterFormatError(f"{directory / name} is damaged; {REMEDY}") from None
    return arrays


def _write_arrays(path: Path, arrays: Arrays) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
    temporary.replace(path)


def _parse(directory: Path, content: bytes) -> RouterRecord:
    try:
        tree = json.loads(content)
        found = tree.get("format") if isinstance(tree, dict) else None
        if found is not None and found != FORMAT:
            raise RouterFormatError(
                f"the router in {directory} has format {found!r}, and this version reads format "
                f"{FORMAT}; use the version that wrote it, or {REMEDY}"
            )
        return RouterRecord.model_validate(tree)
    except ValueError:  # not JSON, or JSON that is no record
        raise RouterFormatError(f"{directory / RECORD_FILE} is damaged; {REMEDY}") from None


def _check(directory: Path, record: RouterRecord, centroids: npt.NDArray[np.float32]) -> None:
    if (
        centroids.dtype != np.float32
        or centroids.shape != (record.clusters, record.dimension)
        or not np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=UNIT_TOLERANCE)
    ):
        raise RouterFormatError(
            f"{directory / CENTROIDS_FILE} does not hold {record.clusters} unit vectors of "
            f"{record.dimension} dimensions; {REMEDY}"
        )
