"""Loss: rank rows by how well the model predicts their answers.  The common baseline (methods.md 7).

    l(x, y) = -1/|y| sum_t log p(y_t | x, y_<t),      perplexity = exp(l): the same ranking

Cost: one epoch of training on the pool, then N forward passes; without the warm-up N forward passes alone.

The mean runs over the answer and its eos, never over the prompt.  A mean favours long answers of easy tokens; nothing
corrects for length here.

Direction and warm-up are ours, as the literature has both ends: filters for text quality keep low perplexity, pruning
by difficulty keeps high loss.  For safety data we keep low loss after one epoch on the pool, because what many rows
agree on is learnt first and mislabelled rows last.  All depends on how far that epoch goes: on the lab's planted pool
it is little better than chance with LoRA, the default, and nearly perfect with `warmup.parameters: full`
(docs/curation.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from apothecary.errors import expect
from apothecary.registry import register
from apothecary.train.config import TrainConfig
from apothecary.train.method import Selector

if TYPE_CHECKING:
    from apothecary.data.rows import Row
    from apothecary.train.workbench import Workbench


@register("curate", "loss")
@dataclass(frozen=True)
class Loss(Selector):
    """Settings; all defaults are ours."""

    direction: Literal["low", "high"] = "low"  # which rows are kept: those predicted well, or badly
    warmup_share: float = 1.0  # of the pool, in [0, 1]; 0: the model scores as it is
    warmup: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=1.0))  # also says which rows are too long
    batch_size: int = 32  # rows, >= 1; changes nothing but speed and memory

    def __post_init__(self) -> None:
        expect(self, "a share in [0, 1]", lambda x: 0 <= x <= 1, "warmup_share")
        expect(self, "at least 1", lambda n: n >= 1, "batch_size")

    def score(self, bench: Workbench, rows: Sequence[Row]) -> dict[str, float]:
        """The mean loss, negated if low is preferred; -inf for a row that is dropped for its length."""
        from apothecary.data.rows import by_id
        from apothecary.train.sweep import sweep
        from apothecary.train.warm_up import scoring, warm_up

        bench.require(self)
        rows = by_id(rows)
        warm_up(bench, rows, self.warmup, self.warmup_share)
        ctx = scoring(bench, self.warmup)
        sign = -1.0 if self.direction == "low" else 1.0
        return sweep(bench, ctx, rows, lambda batch: sign * ctx.per_sample_loss(batch), self.warmup,
                     batch_size=self.batch_size)  # fmt: skip
