"""Texts of like length are computed together, as many as it pays for, and come back in order."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from router.tokens import BATCH_TOKENS, Ids, in_batches


@given(lengths=st.lists(st.integers(0, 2 * BATCH_TOKENS), max_size=40))
def test_batches_are_small_and_of_like_length(lengths: list[int]) -> None:
    texts = [[place] * length for place, length in enumerate(lengths)]
    batches: list[list[int]] = []

    def run(ids: Ids) -> npt.NDArray[np.float32]:
        batches.append([len(tokens) for tokens in ids])
        return np.array([[sum(tokens), len(tokens)] for tokens in ids], dtype=np.float32)

    found = in_batches(texts, 2, run)
    assert found.tolist() == [[place * length, length] for place, length in enumerate(lengths)]
    assert [length for batch in batches for length in batch] == sorted(lengths)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(batch) <= BATCH_TOKENS
    for batch, following in pairwise(batches):
        assert (len(batch) + 1) * following[0] > BATCH_TOKENS, "one more would have had room"
