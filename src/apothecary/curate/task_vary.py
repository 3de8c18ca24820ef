"""TaskVary: keep alignment rows that are least like the customer's task.  Hsiung et al. 2025, arXiv 2506.05346.

    s(z) = - mean over customer rows u of cos(e(z), e(u)),      or - max,      or - min over u of the rank of cos

It needs the customer's rows when the model is aligned, before they would be known (methods.md 3.6).  They are those of
role "customer", without what an attacker adds.

Cost: a forward pass for each row of the pool and of the customer, then N x U inner products.

e: the model's last hidden state at the answer's last token, as on the authors' project page; `tokens: all` averages
over prompt and answer.  That page takes the K rows of the pool that are least similar to each customer row:
`over: rank`, where a row comes as early as the customer row that is least like it puts it.  Reconstructed: the mean and
the maximum (methods.md 7), as Pharmacist, whose baseline this is, does not say what it used.  Could not be confirmed:
the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from apothecary.errors import DataError, expect
from apothecary.registry import register
from apothecary.train.config import TrainConfig
from apothecary.train.method import Needs, Selector
from apothecary.train.progress import Watch, unwatched, watched

if TYPE_CHECKING:
    import numpy as np

    from apothecary.data.rows import Row
    from apothecary.train.workbench import Workbench

CHUNK = 256  # customer rows whose similarities to the whole pool are in memory at once


@register("curate", "task_vary", paper="2506.05346")
@dataclass(frozen=True)
class TaskVary(Selector):
    """Hyper-parameters of TaskVary."""

    over: Literal["mean", "max", "rank"] = "mean"  # customer rows (reconstructed; authors' page: rank)
    direction: Literal["low", "high"] = "low"  # which rows are kept: the least similar (paper), or the most
    tokens: Literal["last", "all", "prompt", "response"] = "last"  # hidden states that count (authors' page: last)
    max_length: int | None = None  # tokens; null: the model's context
    over_long: Literal["error", "drop"] = "error"  # longer rows are refused, or left out
    batch_size: int = 32  # rows, >= 1; changes nothing but speed and memory

    needs = Needs(roles=("customer",))

    def __post_init__(self) -> None:
        expect(self, "at least 1", lambda n: n >= 1, "batch_size")

    def score(self, bench: Workbench, rows: Sequence[Row]) -> dict[str, float]:
        """Minus the similarity, or plus it; -inf for a row that is dropped for its length."""
        import numpy as np

        from apothecary.train.embeddings import embed

        bench.require(self)
        config = TrainConfig(max_length=self.max_length, over_long=self.over_long)
        ctx = bench.context(config)
        pool_ND, user_UD = (
            embed(bench, ctx, some, config, name, self.tokens, batch_size=self.batch_size)
            for name, some in (("pool", rows), ("customer", bench.aux["customer"]))
        )
        user_UD = user_UD[~np.isnan(user_UD[:, 0])]
        if not len(user_UD):
            raise DataError("every customer row is longer than the model takes; shorten them, or raise max_length")
        score_N = self.unlikeness(pool_ND, user_UD, partial(watched, bench))
        return {row.id: value for row, value in zip(rows, score_N.tolist(), strict=True)}

    def unlikeness(self, pool_ND: np.ndarray, user_UD: np.ndarray, watch: Watch = unwatched) -> np.ndarray:
        """The score of each row, [N]; -inf where the embedding is NaN."""
        import numpy as np
        from scipy.stats import rankdata

        sign = 1.0 if self.direction == "high" else -1.0
        usable_N = ~np.isnan(pool_ND[:, 0])
        found_N = np.full(usable_N.sum(), {"mean": 0.0, "max": -np.inf, "rank": np.inf}[self.over])
        blocks = range(0, len(user_UD), CHUNK)
        for start in watch(blocks, len(blocks), "similarities"):
            cosine_NU = pool_ND[usable_N] @ user_UD[start : start + CHUNK].T
            if self.over == "mean":
                found_N += cosine_NU.sum(1) / len(user_UD)
            elif self.over == "max":
                found_N = np.maximum(found_N, cosine_NU.max(1))
            else:  # the place of each row from the customer row's point of view, 0 for the first to keep
                rank_NU = rankdata(-sign * cosine_NU, method="min", axis=0) - 1  # rows alike have one place
                found_N = np.minimum(found_N, rank_NU.min(1))
        score_N = np.full(len(pool_ND), -np.inf)
        score_N[usable_N] = -found_N if self.over == "rank" else sign * found_N
        return score_N
