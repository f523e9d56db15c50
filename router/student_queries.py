"""Made-up queries: spans of real texts, and texts that change into others at a word they share.

Knows nothing of what becomes of them. A student that learns from these too, with what the embedder
says of them, answers a tenth more of the queries at the same agreement.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

SPAN_SHARE = 0.3
"""Of the queries, those that are spans of one text."""
WORDS = 60
"""Words of a query at most."""
SOURCE_WORDS = 100
"""Words of a text that are drawn from."""
SOURCES = 50_000
"""Texts drawn from, at most."""
TRIES = 4
"""Tries for each query that is asked for: of few or short texts fewer queries can be made."""


def made_up_queries(
    texts: Sequence[str], count: int, *, seed: int, known: Collection[str] = ()
) -> list[str]:
    """Up to `count` distinct queries that are none of the texts; the same for a seed.

    Args:
        texts: what they are made of.
        count: how many to make.
        seed: of every choice.
        known: other texts that they must not be either.
    """
    rng = random.Random(seed)
    chosen = rng.sample(range(len(texts)), min(SOURCES, len(texts)))
    # A word has at most twelve characters on average, or its text is none that can be drawn from.
    sources = [texts[place][: SOURCE_WORDS * 12].split()[:SOURCE_WORDS] for place in chosen]
    sources = [words for words in sources if len(words) > 1]
    if not sources:
        return []
    places: dict[str, list[tuple[int, int]]] = {}
    for number, words in enumerate(sources):
        for place, word in enumerate(words):
            places.setdefault(word, []).append((number, place))
    known, made = {*texts, *known}, dict[str, None]()
    for _ in range(count * TRIES):
        if len(made) >= count:
            break
        words = rng.choice(sources)
        if rng.random() < SPAN_SHARE:
            length = rng.randint(2, max(2, min(WORDS, len(words) - 1)))
            start = rng.randint(0, len(words) - length)
            query = words[start : start + length]
        else:
            place = rng.randrange(len(words))
            other, there = rng.choice(places[words[place]])
            query = (words[:place] + sources[other][there:])[:WORDS]
        text = " ".join(query)
        if text not in known:
            made[text] = None
    return list(made)
