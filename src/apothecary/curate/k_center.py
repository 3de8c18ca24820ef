"""k-center: keep rows that cover the pool, the farthest from all kept ones next.  Sener and Savarese 2018,
arXiv 1708.00489.

    u_1 = the row nearest to the mean,   u_k = argmax_i min_{j < k} ||e_i - e_(u_j)||

The score is minus the place in this order, so that any share keeps a prefix of it: the greedy solution for that share,
whose radius is at most twice the best one.

Cost: N forward passes for the embeddings, which lie on disk, then for each ordered row one product of the N x D matrix
with a vector: N^2 D multiplications for all of them, or N D `limit`.  A kill keeps the embeddings and costs the order.

Embeddings: the mean last hidden state over prompt and answer, of length 1.  Reconstructed for language models: the
paper takes the features of an image classifier that is trained on the rows labelled so far.  It starts from such rows;
here the first is the most central one, or a random one.  The greedy algorithm alone is here, not the paper's integer
program that leaves outliers out, so outliers are chosen early; vectors of length 1 soften that.  Distances that differ
by less than rounding does are ties, which the smaller row id wins.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from apothecary.errors import expect
from apothecary.registry import register
from apothecary.train.config import TrainConfig
from apothecary.train.method import Selector
from apothecary.train.progress import Watch, unwatched, watched

if TYPE_CHECKING:
    import numpy as np

    from apothecary.data.rows import Row
    from apothecary.train.workbench import Workbench

TIE = 1e-5  # of the largest squared norm: what single precision may leave of a squared distance of 0


@register("curate", "k_center", paper="1708.00489")
@dataclass(frozen=True)
class KCenter(Selector):
    """Hyper-parameters; all but the greedy rule are ours."""

    tokens: Literal["all", "prompt", "response", "last"] = "all"  # which hidden states the embedding averages
    normalise: bool = True  # embeddings of length 1
    start: Literal["centre", "random"] = "centre"  # the first row
    limit: int | None = None  # >= 1, rows to put in order; the rest follows by its distance; null: all
    max_length: int | None = None  # tokens; null: the model's context
    over_long: Literal["error", "drop"] = "error"  # longer rows are refused, or left out
    batch_size: int = 32  # rows, >= 1; changes nothing but speed and memory

    def __post_init__(self) -> None:
        expect(self, "null or at least 1", lambda n: n is None or n >= 1, "limit")
        expect(self, "at least 1", lambda n: n >= 1, "batch_size")

    def score(self, bench: Workbench, rows: Sequence[Row]) -> dict[str, float]:
        """Minus the place in the order; -inf for a row that is dropped for its length."""
        from apothecary.data.rows import by_id
        from apothecary.train.embeddings import embed

        bench.require(self)
        rows = by_id(rows)
        config = TrainConfig(max_length=self.max_length, over_long=self.over_long)
        embedding_ND = embed(bench, bench.context(config), rows, config, "pool", self.tokens, self.normalise,
                             self.batch_size)  # fmt: skip
        scores = dict.fromkeys((row.id for row in rows), -math.inf)
        for place, i in enumerate(self.order(embedding_ND, bench.seed, partial(watched, bench))):
            scores[rows[i].id] = -float(place)
        return scores

    def order(self, embedding_ND: np.ndarray, seed: int, watch: Watch = unwatched) -> list[int]:
        """Indices of the rows that have an embedding, the first to be kept first; `watch` sees the turns go by."""
        import numpy as np

        square_N = np.einsum("nd,nd->n", embedding_ND, embedding_ND)
        usable_N = ~np.isnan(square_N)
        if not usable_N.any():
            return []
        tie = TIE * square_N[usable_N].max()
        nearest_N = np.full(len(square_N), -np.inf, square_N.dtype)  # squared distance to the closest kept row
        if self.start == "random":
            nearest_N[random.Random(seed).choice(np.flatnonzero(usable_N).tolist())] = np.inf
        else:
            mean_D = embedding_ND.mean(0, dtype=np.float64, where=usable_N[:, None]).astype(square_N.dtype)
            nearest_N[usable_N] = (2 * (embedding_ND @ mean_D) - square_N)[usable_N]
        order: list[int] = []
        turns = min(self.limit or len(square_N), int(usable_N.sum()))
        for _ in watch(range(turns), turns, "distances"):
            chosen = int(np.flatnonzero(nearest_N >= nearest_N.max() - tie)[0])
            distance_N = square_N + square_N[chosen] - 2 * (embedding_ND @ embedding_ND[chosen])
            nearest_N[usable_N] = (np.minimum(nearest_N, distance_N) if order else distance_N)[usable_N]
            order.append(chosen)
            nearest_N[chosen] = -np.inf
        rest = np.argsort(-nearest_N, kind="stable")
        return order + [int(i) for i in rest if nearest_N[i] > -np.inf]
