"""The router's vocabulary: one decision and the candidates it was made among.

Knows nothing of embedders or centroids, so that everything may import it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

OnProgress = Callable[[str, int, int], None]
"""Called with a stage's name, the units done and their total."""


def ignore(*_: object) -> None:
    """Take no notice: the default listener."""


Decider = Literal["student", "embedder"]
"""What a route comes from: the distilled student, where it was sure, or the full embedder."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One expert that a text might go to."""

    expert: str
    """Expert id, such as `expert-0007`."""
    score: float
    """Cosine of the text and the expert's centroid, in [-1, 1]."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where one text goes."""

    expert: str | None
    """Expert id of the winning cluster; none where the router abstains and the base answers."""
    cluster: int
    """The winning cluster, whether or not the router abstains."""
    score: float
    """Cosine of the text and the winning centroid, in [-1, 1]."""
    margin: float
    """Score less the runner-up's; 0 or more. With a single cluster, the score less -1."""
    abstained: bool
    """Whether the score lies below the calibrated threshold."""
    top: tuple[Candidate, ...]
    """The best candidates, falling by score; the first is the winner, abstention or not."""
    by: Decider = "embedder"
    """What decided; scores of the student are estimates of those of the embedder."""
