"""Words that set a cluster apart from the rest of the corpus.

Knows nothing of clusters' making; counts words alone.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable

WORD = re.compile(r"[^\W\d_]{3,}")
MIN_DOCUMENTS = 2
"""A word of a single document says nothing about its cluster."""
MOST_WORDS = 1_000_000
"""Words counted at a time; what a large corpus holds beyond is misspellings and identifiers."""


class WordCounts:
    """In how many documents each word occurs, in bounded memory.

    When there are too many words, every count loses what the rare half of them has, and those
    words go (Misra and Gries 1982, Finding repeated elements): a count is too low by a small share
    of the documents at the most.
    """

    def __init__(self, texts: Iterable[str] = (), *, most_words: int = MOST_WORDS) -> None:
        self.documents = 0
        self._counts: Counter[str] = Counter()
        self._most_words = most_words
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Count a document."""
        self.documents += 1
        self._counts.update(set(WORD.findall(text.lower())))
        if len(self._counts) > self._most_words:
            lost = sorted(self._counts.values())[len(self._counts) // 2]
            self._counts = Counter(
                {word: seen - lost for word, seen in self._counts.items() if seen > lost}
            )

    def __getitem__(self, word: str) -> int:
        return self._counts[word]

    def items(self) -> Iterable[tuple[str, int]]:
        """Each word with the documents that hold it."""
        return self._counts.items()


def top_terms(cluster: WordCounts, everywhere: WordCounts, count: int = 10) -> list[str]:
    """The `count` strongest words of a cluster, strongest first.

    A class-based TF-IDF in the spirit of BERTopic (arXiv 2203.05794, section 3.3). The frequency
    of a word is the share of the cluster's documents that hold it, so that one long document
    cannot fill the list, and the rarity is how many times larger that share is than in the whole
    corpus, so that words common everywhere weigh nothing without a list of stop words.

    Args:
        cluster: the words of its documents.
        everywhere: the words of the corpus, the cluster included.
        count: words at the most.
    """

    def weight(word: str, seen: int) -> float:
        share = seen / cluster.documents
        # A word forgotten there is rare there.
        share_everywhere = max(everywhere[word], seen) / everywhere.documents
        return share * math.log(share / share_everywhere)

    words = dict(cluster.items())
    frequent = [word for word, seen in words.items() if seen >= MIN_DOCUMENTS] or list(words)
    return sorted(frequent, key=lambda word: (-weight(word, words[word]), -words[word], word))[
        :count
    ]
