"""Pharmacist: keep the alignment rows that help most after a simulated attack.  Liu et al. 2025, arXiv 2510.10085.

    theta* = theta_0 - eta_theta * (1/B) sum_j N gamma_j(w) grad l_j(theta_0),      gamma = softmax(w) over the pool
    theta' = theta* - alpha * grad h(theta*),   v = grad f(theta'),   s_j = < v, grad l_j(theta_0) >
    w_i   <- w_i + eta_w * eta_theta * (1 - alpha) * (N/B) gamma_i * (s_i [i in batch] - sum_j gamma_j s_j)

The sums run over a batch of B of the pool's N rows.  f: mean loss on validation rows (safe answers), h: on harmful
rows, theta_0: the model after a warm-up on the pool.  mode "bilevel" is the paper's algorithm; mode "score" (ours)
ranks by s_j at theta_0, without the lower step: v once, from all harmful and validation rows, then one sweep over the
pool.

Cost: the warm-up, then per selector step ("bilevel") 3 forward + 3 backward and 2 forwards for s_j, or ("score") one
pass over the harmful and validation rows and 2 forwards over the pool; hessian "exact" adds a double backward.

The paper puts 1 - alpha for I - alpha H_h, the attack's derivative; hessian "exact" takes v - alpha H_h(theta*) v
instead, and the update follows the gradient of f(theta'(w)).  Under Adam only the sign of 1 - alpha counts: at
alpha = 1 the printed update vanishes and beyond it turns round, so such an alpha is refused.
Adam also divides a row's pull by its own size, so that w tells how steady s_j is, not how large, and the modes rank
unlike (docs/curation.md has their correlation); betas null is plain descent, which wants a far larger eta_w.
Reconstructed, since the authors' repository cannot be had: eta_w, eta_theta, alpha, the number of selector steps, batch
sizes and how batches are drawn, Adam on w, the LoRA layout, and whether the softmax spans the pool (methods.md 3.4).
N and 1/B are ours, so that the mean weight is 1 and a step does not grow with its batch; duplicates of a row have equal
weights as long as they share batches.  Not confirmed: which model and task the paper's tables are of.  f and h are
means over the response tokens of a batch, l_j over those of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Literal

from apothecary.errors import expect
from apothecary.registry import register
from apothecary.train.config import WARM_UP, TrainConfig
from apothecary.train.method import Needs, Selector, State
from apothecary.train.progress import watched

if TYPE_CHECKING:
    from torch import Tensor

    from apothecary.data.rows import Row
    from apothecary.train.batch import Batch
    from apothecary.train.context import StepContext
    from apothecary.train.scores import Weights
    from apothecary.train.workbench import Workbench


@register("curate", "pharmacist", paper="2510.10085")
@dataclass(frozen=True)
class Pharmacist(Selector):
    """Hyper-parameters; all are reconstructed but the 200 steps of the warm-up, which became a share of the pool."""

    mode: Literal["bilevel", "score"] = "bilevel"
    alpha: float = 0.1  # >= 0, step of the simulated attack (Booster)
    normalise: bool = False  # divide the harmful gradient by its norm before the step
    hessian: Literal["scalar", "exact"] = "scalar"  # 1 - alpha as printed, or one double backward
    eta_theta: float = 1e-3  # > 0, step of the lower level (T-Vaccine's alignment rate)
    eta_w: float = 5e-3  # > 0, learning rate of w (SEAL, for Adam)
    betas: tuple[float, float] | None = (0.9, 0.999)  # Adam's on w (ours); null: plain descent
    init: float = 0.1  # w of every row at the start (SEAL)
    epochs: int = 3  # >= 1, passes over the pool in mode "bilevel" (SEAL)
    batch_size: int = 10  # >= 1, rows of the pool, the harmful and the validation set per step (T-Vaccine)
    gradient: Literal["central", "exact"] = "central"  # s_j by two forwards, or by one backward per row (ours)
    sweep_batch_size: int = 32  # >= 1, rows scored at a time in mode "score"; changes nothing but speed and memory
    warmup_share: float = 0.4  # of the pool, in [0, 1]: 200 steps (paper) of 10 rows out of 5,000
    warmup: TrainConfig = WARM_UP  # training to theta_0; its parameters are those scored

    needs = Needs(roles=("validation", "harmful"))

    def __post_init__(self) -> None:
        expect(self, "at least 0", lambda x: x >= 0, "alpha")
        expect(self, "a finite number above 0", lambda x: x > 0 and math.isfinite(x), "eta_theta", "eta_w")
        expect(self, "null or two numbers in [0, 1)", lambda pair: all(0 <= x < 1 for x in pair or ()), "betas")
        expect(self, "at least 1", lambda n: n >= 1, "epochs", "batch_size", "sweep_batch_size")
        expect(self, "a share in [0, 1]", lambda x: 0 <= x <= 1, "warmup_share")
        if (self.mode, self.hessian) == ("bilevel", "scalar"):
            expect(self, "below 1, as 1 - alpha scales the update; or set hessian: exact", lambda x: x < 1, "alpha")

    def score(self, bench: Workbench, rows: Sequence[Row]) -> dict[str, float]:
        """w_i of each row ("bilevel") or s_i ("score"); -inf for a row that is dropped for its length."""
        from apothecary.data.rows import by_id
        from apothecary.train.internals import refuse_double_backward
        from apothecary.train.scores import pool_scores
        from apothecary.train.simulated_attack import whole_set
        from apothecary.train.warm_up import scoring, warm_up

        bench.require(self)
        if self.hessian == "exact":
            refuse_double_backward(bench.loaded.model)
        rows = by_id(rows)
        warm_up(bench, rows, self.warmup, self.warmup_share)
        if self.mode == "bilevel":
            return self.learn(bench, rows)
        ctx = scoring(bench, self.warmup)
        target = self.after_attack(ctx, *(whole_set(bench, ctx, role) for role in ("harmful", "validation")))
        return pool_scores(bench, ctx, rows, target, "mean", self.gradient, self.sweep_batch_size)

    def learn(self, bench: Workbench, rows: Sequence[Row]) -> dict[str, float]:
        """w after `epochs` passes over the pool; killed, it goes on from the last saved step."""
        from apothecary.data.batching import plan
        from apothecary.train import row_weights
        from apothecary.train.on_demand import OnDemand
        from apothecary.train.scores import probe
        from apothecary.train.warm_up import scoring

        ctx = scoring(bench, replace(self.warmup, aux_batch_size=self.batch_size), self.needs.roles)
        pool, file = OnDemand(bench, rows, self.warmup), bench.folder / "checkpoints" / "row_weights.pt"
        state = row_weights.load(file, ctx.device) or row_weights.fresh(ctx, len(pool), self.init)
        ctx.auxiliary.drawn.update((role, state["steps"]) for role in self.needs.roles)
        sample = probe(bench, ctx, rows) if self.gradient == "central" else None
        batches = (chosen for epoch in range(self.epochs)
                   for chosen in plan(pool.lengths, self.batch_size, bench.seed, epoch))  # fmt: skip
        left = self.epochs * math.ceil(len(pool) / self.batch_size) - state["steps"]
        for chosen in watched(bench, islice(batches, state["steps"], None), left, "row weights", "step"):
            self.selector_step(ctx, pool.batch(chosen, ctx), chosen, state, sample)
            if self.warmup.save_every and state["steps"] % self.warmup.save_every == 0:
                row_weights.save(state, file)
        return pool.scores(state["w"])

    def selector_step(self, ctx: StepContext, batch: Batch, chosen: Sequence[int], state: State,
                      sample: Batch | None) -> None:  # fmt: skip
        """The parameters are theta_0 before and after; the step of central differences is checked on `sample`."""
        from apothecary.train.row_weights import descend, sigma
        from apothecary.train.scores import checked_step, row_scores

        ctx.begin_step(1)
        ctx.begin_micro_step(0)
        target = self.target(ctx, batch, sigma(state["w"], chosen), ctx.aux("harmful"), ctx.aux("validation"))
        if sample is not None and "difference" not in state:
            state["difference"] = checked_step(ctx, sample, target, "mean")
        slopes_B = row_scores(ctx, batch, target, "mean", state.get("difference"))
        descend(state, self.gradient_of_w(state["w"], chosen, slopes_B), self.eta_w, self.betas)

    def target(self, ctx: StepContext, batch: Batch, sigma_B: Tensor, harmful: Batch, validation: Batch) -> Weights:
        """v after the lower step and the attack."""
        from apothecary.train.scores import scaled

        of_means_B = sigma_B / len(sigma_B) * batch.normaliser / batch.tokens_B  # (1/B) sum_j sigma_j l_j
        with ctx.perturbed(scaled(ctx.grads(batch, of_means_B), -self.eta_theta)):
            return self.after_attack(ctx, [harmful], [validation])

    def after_attack(self, ctx: StepContext, harmful: Sequence[Batch], validation: Sequence[Batch]) -> Weights:
        from apothecary.train.simulated_attack import post_attack_gradient

        return post_attack_gradient(ctx, harmful, validation, self.alpha, self.normalise, self.hessian == "exact")

    def gradient_of_w(self, w_N: Tensor, chosen: Sequence[int], slopes_B: Tensor) -> Tensor:
        """d f(theta') / d w, [N]."""
        from apothecary.train.row_weights import gradient

        factor = 1.0 if self.hessian == "exact" else 1 - self.alpha
        return -self.eta_theta * factor * gradient(w_N, chosen, slopes_B, len(chosen))
