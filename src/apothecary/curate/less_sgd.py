"""LESS with SGD directions: the cheap relative of LESS, without gradients of single pool rows.  Ours, after LESS
(Xia et al. 2024, arXiv 2402.04333).

    score(z) = max over subtasks of sum_k (eta_k / sum eta) < grad l(z; theta_k), v_k >
    v_k      = mean over the subtask's validation rows z' of unit(grad l(z'; theta_k))

In place of Adam's direction stands the plain gradient, and it is not divided by its norm, so that each product is a
directional derivative of the row's loss: two batched forwards and no backward over the pool.

Cost: the warm-up; for each epoch of it one forward + backward per validation row, and for each subtask two forwards
over the pool.

Differences from LESS: no Adam state, no norm of the pool's rows (rows with large gradients, short ones above all, get
scores of large size), no projection; full parameters can be scored too.  The warm-up is that of LESS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from apothecary.errors import expect
from apothecary.models.settings import ATTENTION, LoraSettings
from apothecary.registry import register
from apothecary.train.config import TrainConfig
from apothecary.train.method import Needs, Selector
from apothecary.train.progress import watched

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from apothecary.data.rows import Row
    from apothecary.train.batch import Batch
    from apothecary.train.context import StepContext
    from apothecary.train.early import Early
    from apothecary.train.scores import Weights
    from apothecary.train.workbench import Workbench


def _warm_up() -> TrainConfig:
    return TrainConfig(learning_rate=2e-5, epochs=4, batch_size=32, schedule="linear", warmup_ratio=0.03,
                       lora=LoraSettings(rank=128, alpha=512, targets=ATTENTION, dropout=0.1))  # fmt: skip


@register("curate", "less_sgd")
@dataclass(frozen=True)
class LessSgd(Selector):
    """Hyper-parameters; the share and the warm-up are those of LESS."""

    share: float = 0.05  # of the pool, in (0, 1]: the rows of the warm-up
    row_loss: Literal["mean", "sum"] = "mean"  # over a row's response tokens; "sum" removes the bias to short rows
    gradient: Literal["central", "exact"] = "central"  # exact: one backward per row and subtask
    batch_size: int = 32  # rows, >= 1; changes nothing but speed and memory
    warmup: TrainConfig = field(default_factory=_warm_up)  # whole epochs: one checkpoint after each

    needs = Needs(roles=("validation",))

    def __post_init__(self) -> None:
        expect(self, "a share in (0, 1]", lambda x: 0 < x <= 1, "share")
        expect(self, "at least 1", lambda n: n >= 1, "batch_size")
        expect(self, "whole epochs without max_steps: a checkpoint follows each",
               lambda c: c.max_steps <= 0 and c.epochs == int(c.epochs), "warmup")  # fmt: skip

    def score(self, bench: Workbench, rows: Sequence[Row]) -> dict[str, float]:
        from apothecary.train.early import influence

        bench.require(self)
        return influence(bench, rows, self.share, self.warmup, partial(self.products, bench, rows))

    def products(self, bench: Workbench, rows: Sequence[Row], point: Early) -> np.ndarray:
        """< grad l(z), v > at one checkpoint, [N, subtasks]."""
        import torch

        from apothecary.train.early import subtasks
        from apothecary.train.scores import checked_step, probe, row_scores
        from apothecary.train.sweep import features
        from apothecary.train.warm_up import scoring

        ctx, target = scoring(bench, self.warmup), bench.aux["validation"]
        ctx.model.eval()
        groups = [[target[i] for i in group] for group in subtasks(target)]
        directions = [self.direction(bench, ctx, group) for group in groups]
        steps: list[float | None] = [None] * len(groups)
        if self.gradient == "central":
            few = probe(bench, ctx, rows)
            steps = [checked_step(ctx, few, v, self.row_loss) for v in directions]

        def measure(batch: Batch) -> Tensor:
            found = [row_scores(ctx, batch, v, self.row_loss, step) for v, step in zip(directions, steps, strict=True)]
            return torch.stack(found, 1)

        name = f"less_sgd-{point.number}"
        return features(bench, ctx, rows, measure, self.warmup, name, len(groups), self.batch_size)

    def direction(self, bench: Workbench, ctx: StepContext, rows: Sequence[Row]) -> Weights:
        """v: the mean of the rows' unit gradients."""
        from apothecary.train.batch import collate
        from apothecary.train.internals import global_norm
        from apothecary.train.scores import combine, scaled

        mean: Weights = {}
        rendered = bench.render(rows, replace(self.warmup, over_long="error"))
        for row in watched(bench, rendered, len(rows), "validation gradients"):
            grads = ctx.grads(collate([row], bench.pad_id, row.supervised).to(ctx.device))
            unit = scaled(grads, 1 / (len(rows) * global_norm(grads.values()).clamp_min(1e-12)))
            mean = combine(mean, unit, 1.0) if mean else unit
        return mean
