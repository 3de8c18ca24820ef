"""LESS: keep the rows whose Adam step most helps a target.  Xia et al. 2024, arXiv 2402.04333.

    Gamma_k(z) = (beta_1 m_k + (1 - beta_1) g) / sqrt(beta_2 v_k + (1 - beta_2) g^2 + 1e-8),   g = grad l(z; theta_k)
    score(z)   = max over subtasks of mean over their validation rows z' of
                 sum_k (eta_k / sum eta) < unit(P Gamma_k(z)), unit(P grad l(z'; theta_k)) >

theta_k, m_k and v_k are the LoRA weights and Adam's state after the k-th epoch of a short training on a few rows, eta_k
that epoch's mean learning rate, P random signs.  m_k and v_k stay fixed, without bias correction.  Subtask: what
`meta` of a validation row names as its subtask, else the row's source.

Cost: the warm-up; then for each epoch of it one batched forward + backward over the pool and the validation rows, from
which the gradients of all rows come (no backward per row).  The projection multiplies every row's gradient with a sign
matrix of D x projection_dim, which is made anew for each batch; on a CPU it outweighs all else.  It saves nothing here,
since the validation rows are averaged before the pool is read: 0 skips it and is exact, where D numbers for each row
of a batch fit in memory and for each validation row on disk.

Deviations from the authors' code (princeton-nlp/LESS): scores are taken in evaluation mode without dropout; gradients
stay in fp32 where theirs are cast to fp16; features of the pool are not kept, only their products with the subtasks'
means; subtasks may differ in size; a batch holds many rows.  Short answers still have large gradients, which the norm
mends only in part (methods.md 7.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from apothecary.errors import expect
from apothecary.models.settings import ATTENTION, LoraSettings
from apothecary.registry import register
from apothecary.train.config import TrainConfig
from apothecary.train.method import Needs, Selector

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from apothecary.data.rows import Row
    from apothecary.train.batch import Batch
    from apothecary.train.context import StepContext
    from apothecary.train.early import Early
    from apothecary.train.workbench import Workbench

    Moments = dict[str, tuple[Tensor, Tensor]]

EPS = 1e-8  # inside the root (authors' code)


def _warm_up() -> TrainConfig:
    return TrainConfig(learning_rate=2e-5, epochs=4, batch_size=32, schedule="linear", warmup_ratio=0.03,
                       lora=LoraSettings(rank=128, alpha=512, targets=ATTENTION, dropout=0.1))  # fmt: skip


@register("curate", "less", paper="2402.04333")
@dataclass(frozen=True)
class Less(Selector):
    """Hyper-parameters; the defaults are the paper's."""

    share: float = 0.05  # of the pool, in (0, 1]: the rows of the warm-up
    projection_dim: int = 8192  # >= 0, size of the projected gradients; 0: no projection
    batch_size: int = 32  # rows, >= 1; changes nothing but speed and memory (ours)
    warmup: TrainConfig = field(default_factory=_warm_up)  # LoRA, whole epochs: one checkpoint after each

    needs = Needs(roles=("validation",))

    def __post_init__(self) -> None:
        expect(self, "a share in (0, 1]", lambda x: 0 < x <= 1, "share")
        expect(self, "at least 0", lambda n: n >= 0, "projection_dim")
        expect(self, "at least 1", lambda n: n >= 1, "batch_size")
        expect(self, "whole epochs without max_steps: a checkpoint follows each",
               lambda c: c.max_steps <= 0 and c.epochs == int(c.epochs), "warmup")  # fmt: skip
        expect(self, "parameters: lora, which LESS is made for", lambda c: c.parameters == "lora", "warmup")

    def score(self, bench: Workbench, rows: Sequence[Row]) -> dict[str, float]:
        from apothecary.train.early import influence

        bench.require(self)
        return influence(bench, rows, self.share, self.warmup, partial(self.products, bench, rows))

    def products(self, bench: Workbench, rows: Sequence[Row], point: Early) -> np.ndarray:
        """< unit(P Gamma(z)), mean over the subtask of unit(P grad l(z')) > at one checkpoint, [N, subtasks]."""
        import torch
        from torch.nn.functional import normalize

        from apothecary.train.early import subtasks
        from apothecary.train.sweep import features
        from apothecary.train.warm_up import scoring

        ctx, moments = scoring(bench, self.warmup), point.moments()
        size = self.projection_dim or sum(p.numel() for p in ctx.parameters().values())
        target, strict = bench.aux["validation"], replace(self.warmup, over_long="error")

        def sgd(batch: Batch) -> Tensor:
            return normalize(self.feature(ctx, batch, bench.seed))

        def adam(batch: Batch) -> Tensor:
            return normalize(self.feature(ctx, batch, bench.seed, moments)) @ means.T

        name = f"less-{point.number}"
        units = features(bench, ctx, target, sgd, strict, f"{name}-validation", size, self.batch_size)
        groups = subtasks(target)
        means = torch.stack([torch.from_numpy(units[group].mean(0)) for group in groups]).to(ctx.device)
        return features(bench, ctx, rows, adam, self.warmup, name, len(groups), self.batch_size)

    def feature(self, ctx: StepContext, batch: Batch, seed: int, moments: Moments | None = None) -> Tensor:
        """The projected gradient of each row, [B, n]; with Adam's moments the projected direction of its step."""
        from apothecary.train.per_row import projected, row_gradients

        blocks = row_gradients(ctx, batch)
        if moments is not None:
            blocks = ((name, self.direction(grads, *moments[name])) for name, grads in blocks)
        return projected(blocks, self.projection_dim, seed)

    def direction(self, grads: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Gamma of each row, [B, *shape]."""
        one, two = self.warmup.betas
        mean = one * first + (1 - one) * grads
        return mean / (two * second + (1 - two) * grads.square() + EPS).sqrt()
