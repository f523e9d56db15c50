"""The score below which the router abstains, drawn from held-out text.

Held-out text is what the experts are meant for, so a cosine lower than all but a small share of
it marks a text that no expert was trained for. Knows nothing of where the scores come from.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from router.errors import CalibrationError

NEVER = -1.0
"""The threshold that no cosine lies below."""
RECORDED_QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


class Calibration(BaseModel):
    """How the abstention threshold came about; stored with the router."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    threshold: float
    """Cosine below which the router abstains; -1 never abstains."""
    quantile: float
    """Share of held-out text that was to fall below it."""
    heldout_texts: int
    """Texts it was drawn from."""
    score_quantiles: dict[str, float]
    """Quantiles of the held-out scores, by share (`0.05`); empty without held-out text."""


def abstention_threshold(scores: npt.ArrayLike, quantile: float) -> float:
    """The largest threshold below which at most `quantile` of the scores lie.

    With distinct scores exactly floor(quantile * N) of them lie below. A quantile of 0 gives -1:
    the lowest held-out score is no reason to turn away one that is a little lower.

    Args:
        scores: cosines of held-out texts with their nearest centroids, shape (N,).
        quantile: share to turn away, in [0, 1].

    Raises:
        CalibrationError: there are no scores to draw from.
        ValueError: the quantile lies outside [0, 1].
    """
    if not 0.0 <= quantile <= 1.0:
        raise ValueError(f"quantile {quantile} lies outside [0, 1]")
    if quantile == 0.0:
        return NEVER
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    if ordered.size == 0:
        raise CalibrationError(
            "no held-out text to calibrate abstention on: add documents under data.valid, raise "
            "data.valid_share, or set router.abstain_quantile to 0 to never abstain"
        )
    # The nudge keeps a product such as 0.29 * 100 = 28.999999999999996 at the count it means.
    turned_away = math.floor(quantile * ordered.size + 1e-9)
    if turned_away >= ordered.size:
        return float(np.nextafter(ordered[-1], np.inf))
    return float(ordered[turned_away])


def calibrate(scores: npt.ArrayLike, quantile: float) -> Calibration:
    """The threshold with the record of what it was drawn from; arguments and errors as above."""
    values = np.asarray(scores, dtype=np.float64)
    shares = RECORDED_QUANTILES if values.size else ()
    return Calibration(
        threshold=abstention_threshold(values, quantile),
        quantile=quantile,
        heldout_texts=values.size,
        score_quantiles={str(share): float(np.quantile(values, share)) for share in shares},
    )
