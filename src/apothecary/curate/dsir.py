"""DSIR: keep rows whose word statistics are those of target rows.  Xie et al. 2023, arXiv 2302.03169.

    c_b(z): how many unigrams and bigrams of row z fall into bucket b = SHA-256(n-gram) mod 10,000
    log w(z) = sum_b c_b(z) [log(p_b + 1e-8) - log(q_b + 1e-8)],      keep the largest log w(z) + Gumbel(0, 1)

p: shares of the buckets among all n-grams of the target, q: among those of the pool.  The target are the rows of role
"validation" (safe answers).  A row's text is its messages and its answer, one to a line; tokens are runs of letters,
digits and underscores or runs of other signs, lower-cased.

Cost: no model; two passes over the pool on the CPU, one hash for each different n-gram.

log w is a sum, so it grows with length and the noise is small beside it: selection is close to the plain top.
Deviations from the authors' code (p-lambda/dsir): it drops texts under 100 tokens, which here would be nearly all
refusals and class labels, so that `min_length` is 0 and shorter rows count instead; its target is not smoothed,
so that with a few hundred target rows every unseen n-gram weighs log 1e-8; our default of 0.1 makes it about as likely
as a rare n-gram of the pool.  Noise is keyed by seed and row id, not by position.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from apothecary.errors import expect
from apothecary.registry import register
from apothecary.train.method import Needs, Selector
from apothecary.train.progress import watched

if TYPE_CHECKING:
    from apothecary.data.rows import Row
    from apothecary.train.workbench import Workbench

EPS = 1e-8  # authors' code: keeps the log of an empty bucket finite
TINY = 1e-300  # keeps the log of a uniform number that came out as 0 finite
_TOKEN = re.compile(r"\w+|[^\w\s]+")


@register("curate", "dsir", paper="2302.03169")
@dataclass(frozen=True)
class Dsir(Selector):
    """Hyper-parameters of DSIR."""

    ngrams: int = 2  # >= 1, longest n-gram, in tokens (paper)
    buckets: int = 10_000  # >= 1 (paper)
    smoothing: float = 0.1  # >= 0, added to each bucket's count in the target (ours; authors' code: 0)
    gumbel: bool = True  # noise, as resampling needs it (paper); false: the largest log w
    min_length: int = 0  # tokens; shorter rows are left out (ours; authors' code: 100)

    needs = Needs(roles=("validation",))

    def __post_init__(self) -> None:
        expect(self, "at least 1", lambda n: n >= 1, "ngrams", "buckets")
        expect(self, "a finite number, at least 0", lambda x: x >= 0 and math.isfinite(x), "smoothing")
        expect(self, "at least 0", lambda n: n >= 0, "min_length")

    def score(self, bench: Workbench, rows: Sequence[Row]) -> dict[str, float]:
        bench.require(self)
        target_b = self.distribution(bench.aux["validation"], self.smoothing)
        raw_b = self.distribution(watched(bench, rows, len(rows), "n-grams of the pool"), 0.0)
        ratio_b = [math.log(p + EPS) - math.log(q + EPS) for p, q in zip(target_b, raw_b, strict=True)]
        scores = {}
        for row in watched(bench, rows, len(rows), "n-gram weights"):
            words = tokens(row)
            weight = math.fsum(ratio_b[bucket] for bucket in self.features(words))
            noise = gumbel(bench.seed, row.id) if self.gumbel else 0.0
            scores[row.id] = weight + noise if len(words) >= self.min_length else -math.inf
        return scores

    def distribution(self, rows: Iterable[Row], smoothing: float) -> list[float]:
        """The share of each bucket among all n-grams of the rows, after `smoothing` was added to each count."""
        counts = Counter(bucket for row in rows for bucket in self.features(tokens(row)))
        total = counts.total() + smoothing * self.buckets
        return [(counts[bucket] + smoothing) / max(total, TINY) for bucket in range(self.buckets)]

    def features(self, words: Sequence[str]) -> Iterator[int]:
        """The bucket of each n-gram, shorter ones first."""
        for n in range(1, self.ngrams + 1):
            for i in range(len(words) - n + 1):
                yield hashed(" ".join(words[i : i + n]), self.buckets)


def tokens(row: Row) -> list[str]:
    text = "\n".join((*(content for _, content in row.prompt), row.response or ""))
    return _TOKEN.findall(text.lower())


@lru_cache(2**18)
def hashed(ngram: str, buckets: int) -> int:
    return int.from_bytes(hashlib.sha256(ngram.encode("utf-8", "surrogatepass")).digest()) % buckets


def gumbel(seed: int, row_id: str) -> float:
    """Gumbel(0, 1), the same for the same seed and row, whatever the pool."""
    exponential = random.Random(f"gumbel:{seed}:{row_id}").expovariate(1.0)
    return -math.log(max(exponential, TINY))
