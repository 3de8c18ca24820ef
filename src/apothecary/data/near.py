"""Near duplicates among prompts: normalised equality and word-set Jaccard similarity.

Splits that share a near duplicate leak; everything that must be disjoint is split by *cluster*.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

THRESHOLD = 0.7
ROUNDING = 1e-9  # 0.55 * 20 is a little above 11 in binary; its ceiling must stay 11
_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> frozenset[str]:
    """The set of lower-case words of `text` after NFKC normalisation, punctuation ignored."""
    return frozenset(_WORD.findall(unicodedata.normalize("NFKC", text).lower()))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """|a & b| / |a | b| in [0, 1]; two empty sets are equal (1.0)."""
    return len(a & b) / len(a | b) if a or b else 1.0


def near_pairs(texts: Sequence[str], threshold: float = THRESHOLD) -> Iterator[tuple[int, int]]:
    """Yield every index pair (i < j) whose word sets have Jaccard similarity >= `threshold`.

    Exact, by prefix filtering: with words ordered from rare to common, two sets of similarity t share a word among the
    first n - ceil(t n) + 1 of each, and what follows the first shared word must suffice for the overlap that t needs.
    ValueError for a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}, expected a similarity in (0, 1]")
    sets = [words(text) for text in texts]
    rarity = Counter(word for bag in sets for word in bag)
    index: dict[str, list[tuple[int, int]]] = defaultdict(list)  # word -> (text, words of the text from it on)
    empty: list[int] = []
    for j, bag in enumerate(sets):
        if not bag:
            yield from ((i, j) for i in empty)
            empty.append(j)
            continue
        ordered = sorted(bag, key=lambda word: (rarity[word], word))
        prefix = ordered[: len(bag) - math.ceil(threshold * len(bag) - ROUNDING) + 1]
        seen: set[int] = set()
        near: list[int] = []
        for place, word in enumerate(prefix):
            for i, left in index[word]:
                if i not in seen:
                    seen.add(i)
                    needed = threshold / (1 + threshold) * (len(bag) + len(sets[i])) - ROUNDING
                    if min(left, len(bag) - place) >= needed and jaccard(sets[i], bag) >= threshold:
                        near.append(i)
            index[word].append((j, len(bag) - place))
        yield from ((i, j) for i in sorted(near))


def clusters(texts: Sequence[str], threshold: float = THRESHOLD) -> list[int]:
    """A cluster number for each text: the connected components of `near_pairs`, numbered by first member."""
    parent = list(range(len(texts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in near_pairs(texts, threshold):
        a, b = root(i), root(j)
        parent[max(a, b)] = min(a, b)
    return [root(i) for i in range(len(texts))]
