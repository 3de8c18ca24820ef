"""Pharmacist: keep the alignment rows that help most after a simulated attack.  Huang et al. 2025, arXiv 2510.10085.

    theta* = theta_0 - eta_theta * sum_j gamma_j(w) grad l_j(theta_0),      gamma = softmax(w) over the pool
    theta' = theta* - alpha * grad h(theta*),   v = grad f(theta'),   s_j = < v, grad l_j(theta_0) >
    w_i   <- w_i + eta_w * eta_theta * (1 - alpha) * gamma_i * (s_i - sum_j gamma_j s_j)

f: mean loss on validation rows (safe answers), h: on harmful rows, theta_0: the model after a warm-up on the pool.
mode "bilevel" is the paper's algorithm; mode "score" ranks by s_j at uniform weights, one sweep over the pool (ours).

Cost: the warm-up, then per selector step ("bilevel") 3 forward + 3 backward and 2 forwards for s_j; for the whole pool
("score") one pass over the harmful and the validation rows and 2 forwards over the pool.

Reconstructed, since the paper's repository cannot be had: eta_w, eta_theta, alpha, the number of steps, batch sizes,
the optimiser of w, the LoRA layout, and whether the softmax spans the pool (methods.md 3.4).  Its 200 warm-up steps are
0.4 epochs of its 5,000 rows at batch 10 and are taken here as that fraction.  gamma is multiplied by N where it weighs
rows, so that the mean weight is 1.  Inner products come from central differences unless `gradient="exact"`.
f and h are means over the response tokens of a batch, not over its rows.  Harmful and validation batches go through
their rows in one seeded order, again and again, whatever the pool's epochs.  Mode "score" skips the step to theta*,
so that theta' = theta_0 - alpha * grad h(theta_0).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from apothecary.errors import expect
from apothecary.registry import register
from apothecary.train.config import TrainConfig
from apothecary.train.method import Needs, Selector, TrainingMethod

if TYPE_CHECKING:
    from torch import Tensor

    from apothecary.data.chat import Rendered
    from apothecary.data.rows import Row
    from apothecary.train.batch import Batch
    from apothecary.train.context import StepContext
    from apothecary.train.scores import Weights
    from apothecary.train.workbench import Workbench


def _warm_up() -> TrainConfig:
    return TrainConfig(learning_rate=1e-3, epochs=0.4, batch_size=10, schedule="constant", warmup_ratio=0.0)


@register("curate", "pharmacist", paper="2510.10085")
@dataclass(frozen=True)
class Pharmacist(Selector):
    """Hyper-parameters; all but the warm-up's length are reconstructed."""

    mode: Literal["bilevel", "score"] = "bilevel"
    alpha: float = 0.1  # >= 0, step of the simulated attack
    normalise: bool = False  # divide the harmful gradient by its norm before the step
    eta_theta: float = 1e-3  # step of the lower level
    eta_w: float = 5e-3  # Adam's learning rate on w (SEAL)
    epochs: int = 3  # passes over the pool in mode "bilevel" (SEAL)
    batch_size: int = 10  # rows of the pool, of the harmful and of the validation set per selector step
    row_loss: Literal["mean", "sum"] = "mean"  # "sum" removes the bias towards short rows (ours)
    gradient: Literal["central", "exact"] = "central"  # how s_j is computed
    warmup: TrainConfig = field(default_factory=_warm_up)  # training to theta_0; its parameters are those scored

    needs = Needs(roles=("validation", "harmful"))

    def __post_init__(self) -> None:
        expect(self, "at least 0", lambda x: x >= 0, "alpha")
        expect(self, "a finite number above 0", lambda x: x > 0 and math.isfinite(x), "eta_theta", "eta_w")
        expect(self, "at least 1", lambda n: n >= 1, "epochs", "batch_size")

    def score(self, bench: Workbench, rows: Sequence[Row]) -> dict[str, float]:
        """w_i of each row ("bilevel") or s_i ("score"); a row that the warm-up may drop for its length comes last."""
        from apothecary.train.fit import train

        bench.require(self)
        train(bench, TrainingMethod(), rows, self.warmup, name="selector")
        bench.loaded.model.eval()
        # Batches are normalised by tokens here, and bf16 noise would drown the central differences.
        ctx = bench.context(replace(self.warmup, reduction="token_mean", precision="fp32"))
        pool = bench.render(rows, self.warmup)
        harmful, validation = (bench.render(bench.aux[role], self.warmup) for role in ("harmful", "validation"))
        pad = bench.pad_id
        if self.mode == "score":
            values = self.single_sweep(ctx, pool, harmful, validation, pad)
        else:
            values = self.bilevel(ctx, pool, harmful, validation, pad, bench.seed, bench.stop)
        scores = dict.fromkeys((row.id for row in rows), float("-inf"))
        return scores | {row.row_id: float(value) for row, value in zip(pool, values, strict=True)}

    # -- the paper's algorithm ------------------------------------------------------------------------------------

    def bilevel(self, ctx: StepContext, pool: list[Rendered], harmful: list[Rendered], validation: list[Rendered],
                pad: int, seed: int, stop=lambda: None) -> Tensor:  # fmt: skip
        """w after `epochs` passes over the pool, [N]."""
        import torch

        from apothecary.data.batching import plan

        w_N = torch.full((len(pool),), 0.1, device=ctx.device)
        optimiser = torch.optim.Adam([w_N], lr=self.eta_w)
        order = random.Random(seed)
        harmful, validation = (order.sample(rows, len(rows)) for rows in (harmful, validation))
        count = 0
        for epoch in range(self.epochs):
            for chosen in plan([len(row.ids) for row in pool], self.batch_size, seed, epoch):
                stop()
                batch = _batch(ctx, [pool[i] for i in chosen], pad)
                attack, safe = (_draw(ctx, rows, count, self.batch_size, pad) for rows in (harmful, validation))
                target = self.target(ctx, batch, self.weights(w_N, chosen), attack, safe)
                w_N.grad = self.gradient_of_w(w_N, chosen, self.alignment(ctx, batch, target))
                optimiser.step()
                count += 1
        return w_N

    @staticmethod
    def weights(w_N: Tensor, chosen: Sequence[int]) -> Tensor:
        """N * gamma_j of the chosen rows, [B]."""
        return (w_N.softmax(0) * len(w_N))[list(chosen)]

    def target(self, ctx: StepContext, batch: Batch, weight_B: Tensor, harmful: Batch, validation: Batch) -> Weights:
        """v = grad f(theta') of one selector step; the parameters are theta_0 before and after."""
        from apothecary.train.scores import combine, scaled

        lower = scaled(self._weighted_gradient(ctx, batch, weight_B), -self.eta_theta)
        with ctx.perturbed(lower):
            attack = ctx.grads(harmful)
        with ctx.perturbed(combine(lower, self._attack_step(attack), 1.0)):
            return ctx.grads(validation)

    def gradient_of_w(self, w_N: Tensor, chosen: Sequence[int], s_B: Tensor) -> Tensor:
        """dF/dw of the one-step lower level, [N]: the softmax Jacobian written out (methods.md 3.3)."""
        import torch

        gamma_N = w_N.softmax(0)
        s_N = torch.zeros_like(w_N).index_add_(0, torch.tensor(list(chosen), device=w_N.device), s_B.to(w_N.dtype))
        scale = self.eta_theta * (1 - self.alpha) * len(w_N) / len(chosen)
        return -scale * gamma_N * (s_N - (gamma_N * s_N).sum())

    # -- one sweep ------------------------------------------------------------------------------------------------

    def single_sweep(self, ctx: StepContext, pool: list[Rendered], harmful: list[Rendered], validation: list[Rendered],
                     pad: int, chunk: int = 32) -> Tensor:  # fmt: skip
        """s_j with v taken once, over all harmful and validation rows, [N]."""
        import torch

        attack = _mean_gradient(ctx, harmful, pad, chunk)
        with ctx.perturbed(self._attack_step(attack)):
            target = _mean_gradient(ctx, validation, pad, chunk)
        order = sorted(range(len(pool)), key=lambda i: len(pool[i].ids))
        values = torch.empty(len(pool))
        for i in range(0, len(order), chunk):
            part = order[i : i + chunk]
            values[part] = self.alignment(ctx, _batch(ctx, [pool[j] for j in part], pad), target).float().cpu()
        return values

    # -- shared ---------------------------------------------------------------------------------------------------

    def alignment(self, ctx: StepContext, batch: Batch, target: Weights) -> Tensor:
        """s_j of each row at theta_0, [B]."""
        from apothecary.train.scores import central_scores, exact_scores

        compute = central_scores if self.gradient == "central" else exact_scores
        return compute(ctx, batch, target, self.row_loss)

    def _weighted_gradient(self, ctx: StepContext, batch: Batch, weight_B: Tensor) -> Weights:
        """(1/B) sum_j N gamma_j grad l_j: the batch's estimate of the lower level's gradient."""
        scale = weight_B / len(batch.row_ids)
        row_weight = scale * batch.normaliser / (1 if self.row_loss == "sum" else batch.tokens_B)
        return ctx.grads(batch, row_weight)

    def _attack_step(self, attack: Weights) -> Weights:
        from apothecary.train.internals import global_norm
        from apothecary.train.scores import scaled

        norm = global_norm(attack.values()).clamp_min(1e-12) if self.normalise else 1.0
        return scaled(attack, -self.alpha / norm)


def _batch(ctx: StepContext, rows: list[Rendered], pad: int) -> Batch:
    from apothecary.train.batch import collate, weigh

    return collate(rows, pad, weigh(rows, "token_mean")).to(ctx.device)


def _draw(ctx: StepContext, rows: list[Rendered], count: int, size: int, pad: int) -> Batch:
    """The `count`-th batch of a cycle through the rows."""
    start = count * size
    return _batch(ctx, [rows[(start + k) % len(rows)] for k in range(min(size, len(rows)))], pad)


def _mean_gradient(ctx: StepContext, rows: list[Rendered], pad: int, chunk: int) -> Weights:
    """The gradient of the mean token loss over all rows."""
    from apothecary.train.batch import collate, weigh
    from apothecary.train.scores import combine

    ordered = sorted(rows, key=lambda row: len(row.ids))
    total, whole = None, weigh(rows, "token_mean")
    for i in range(0, len(ordered), chunk):
        grads = ctx.grads(collate(ordered[i : i + chunk], pad, whole).to(ctx.device))
        total = grads if total is None else combine(total, grads, 1.0)
    assert total is not None
    return total
