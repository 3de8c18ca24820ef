"""Booster: alignment under which a harmful gradient step gains little.  Huang et al. 2024, arXiv 2409.01586.

    q = grad h(theta),   theta~ = theta - alpha * q / (||q|| + 1e-7),   q~ = grad h(theta~)
    update with grad f(theta) + lamb * (q - q~)

which is the gradient of f(theta) + lamb * (h(theta) - h(theta~)) with the direction q / ||q|| held fixed.  f: loss on
the alignment batch; h: on `aux_batch_size` harmful rows, drawn once per optimiser step and passed through the model in
one piece; the norm spans all trainable tensors.

Cost: 3 forward + 3 backward per optimiser step where the harmful batch has the size of the alignment batch; beside
`.grad`, which takes up lamb * q and then -lamb * q~, one tensor for each trainable parameter: q, then theta~.

The authors train on 5000 refusals and 5000 harmful rows with aux_batch_size 10, batch_size 10, learning_rate 5e-4, 20
epochs, a constant schedule without warm-up, weight_decay 0.1, max_length 256, and LoRA of rank 32, alpha 4 and dropout
0 on q, k and v (methods.md 1.3, 4.5).

Deviations from the authors' code (git-disl/Booster): accumulated gradients survive the probes; theta is put back
untouched; both harmful passes draw the same dropout masks; parameters without a gradient are left out; processes share
one q; the loss reported is the objective, not f alone.  Taking q only in every k-th step is not offered: theta and the
harmful batch move on, and with them what lamb * (q - q~) is the gradient of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from apothecary.errors import expect
from apothecary.registry import register
from apothecary.train.method import Needs, State, TrainingMethod

if TYPE_CHECKING:
    from torch import Tensor

    from apothecary.train.batch import Batch
    from apothecary.train.context import StepContext

EPS = 1e-7  # authors' code: keeps a zero gradient at zero


@register("align", "booster", paper="2409.01586")
@dataclass(frozen=True)
class Booster(TrainingMethod):
    """Hyper-parameters of Booster."""

    lamb: float = 5.0  # >= 0, weight of the regulariser (authors' code)
    alpha: float = 0.1  # >= 0, length of the harmful step in weight space (authors' code)

    needs = Needs(roles=("harmful",))

    def __post_init__(self) -> None:
        expect(self, "at least 0", lambda x: x >= 0, "lamb", "alpha")

    def step(self, ctx: StepContext, batch: Batch, state: State) -> Tensor:
        loss = ctx.backward(batch)
        ctx.log("align", loss)
        if self.lamb and ctx.last_micro_step:
            loss = loss + self.regulariser(ctx, ctx.aux("harmful", per="step"))
        return loss

    def regulariser(self, ctx: StepContext, harmful: Batch) -> Tensor:
        """Accumulate lamb * (q - q~); this process's share of lamb * (h(theta) - h(theta~))."""
        before, q = ctx.value_and_grads(harmful)
        ctx.accumulate(q, self.lamb)
        with ctx.at(self.after_harmful_step(ctx, q)):
            after = ctx.backward(harmful, -self.lamb) / -self.lamb
        value = self.lamb * (before - after)
        for name, component in (("harmful_before", before), ("harmful_after", after), ("regulariser", value)):
            ctx.log(name, component)
        return value

    def after_harmful_step(self, ctx: StepContext, q: dict[str, Tensor]) -> dict[str, Tensor]:
        """theta~; takes the place of q, tensor by tensor, so that they are never held at the same time."""
        from apothecary.train.internals import global_norm, moved

        scale = -self.alpha / (global_norm(q.values()) + EPS)
        for name, p in ctx.parameters().items():
            q[name] = moved(p, scale.to(p.device) * q[name])
        return q
