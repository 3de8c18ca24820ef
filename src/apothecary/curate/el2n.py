"""EL2N: rank rows by the size of the error vector in early training.  Paul et al. 2021, arXiv 2107.07075.

    score(z) = mean over checkpoints k of mean over response tokens t of || softmax(logits_t) - onehot(y_t) ||_2

The checkpoints stand at equal distances in a short training on the pool, since a finished model errs on few rows.

Cost: the warm-up, then one forward over the pool for each checkpoint.

Deviations: the paper scores images by one error vector each and averages over ten initialisations at one early epoch; a
pretrained model has one, so that early checkpoints take their place, and a row's tokens are averaged (methods.md 7).
Reconstructed, since the paper trains no language model: the warm-up's length and learning rate, the number of
checkpoints.
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
    from torch import Tensor

    from apothecary.data.rows import Row
    from apothecary.train.batch import Batch
    from apothecary.train.workbench import Workbench


def _warm_up() -> TrainConfig:
    return TrainConfig(learning_rate=1e-3, epochs=0.4, batch_size=10, schedule="constant", warmup_ratio=0.0)


@register("curate", "el2n", paper="2107.07075")
@dataclass(frozen=True)
class El2n(Selector):
    """Hyper-parameters; all but the direction are reconstructed."""

    direction: Literal["high", "low"] = "high"  # which rows are kept: those with large errors (paper) or with small
    checkpoints: int = 4  # >= 1; fewer where the warm-up has fewer steps
    batch_size: int = 32  # rows, >= 1; changes nothing but speed and memory
    warmup: TrainConfig = field(default_factory=_warm_up)  # the last checkpoint stands at its end

    def __post_init__(self) -> None:
        expect(self, "at least 1", lambda n: n >= 1, "checkpoints", "batch_size")

    def score(self, bench: Workbench, rows: Sequence[Row]) -> dict[str, float]:
        from apothecary.data.rows import by_id
        from apothecary.train.early import early
        from apothecary.train.sweep import sweep
        from apothecary.train.warm_up import scoring

        rows = by_id(rows)  # so that the order of the pool changes nothing
        sign = 1 if self.direction == "high" else -1
        scores, visited = dict.fromkeys((row.id for row in rows), 0.0), 0
        for point in early(bench, rows, self.warmup, self.checkpoints):
            ctx = scoring(bench, self.warmup)

            def measure(batch: Batch, ctx=ctx) -> Tensor:
                logits = ctx.forward(batch, grad=False, logits=batch.tail).logits
                return sign * errors(logits, batch)

            found = sweep(bench, ctx, rows, measure, self.warmup, f"el2n-{point.number}", self.batch_size)
            scores, visited = {name: score + found[name] for name, score in scores.items()}, visited + 1
        return {name: score / visited for name, score in scores.items()}


def errors(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """|| softmax - onehot ||_2, mean over the response tokens of each row, [B], in at least fp32.

    Logits of the batch's tail will do.
    """
    import torch

    from apothecary.data.chat import IGNORE

    targets_BT = batch.labels[:, -logits_BTV.shape[1] :][:, 1:]
    counted_BT = targets_BT != IGNORE
    logits_NV = logits_BTV[:, :-1][counted_BT]  # response tokens of all rows
    error_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).softmax(-1)
    error_NV[torch.arange(len(error_NV), device=error_NV.device), targets_BT[counted_BT]] -= 1
    norms_BT = torch.zeros(targets_BT.shape, dtype=error_NV.dtype, device=error_NV.device)
    norms_BT[counted_BT] = error_NV.norm(dim=-1)
    return norms_BT.sum(1) / batch.tokens_B
