"""How security vectors are trained: harmful rows become likely, benign rows stay as they were (methods.md 2.3).

    repeat:   theta' = theta;   K times   theta' <- theta' - eta * grad_theta' NLL(harmful; theta', theta_s)
              step on theta_s, with theta' held fixed, along the gradient of
                  NLL(harmful; theta', theta_s) + lamb * KL( p(.|benign; theta') || p(.|benign; theta', theta_s) )
              theta' is dropped
    until     the mean of NLL(harmful; theta, theta_s) over ten steps is below the target

theta is the backbone, all of it, and theta_s the vectors; without inner steps (K = 0) theta' = theta.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from apothecary.train.method import Needs, State, TrainingMethod

if TYPE_CHECKING:
    from torch import Tensor

    from apothecary.train.batch import Batch
    from apothecary.train.context import StepContext

VECTORS = "security_vectors"  # name of the adapter, in the customer's training too
LEARNED = "learned"  # role of the rows that the vectors learn from, of which the inner steps make draws of their own
WINDOW = 10  # steps that the criterion looks at
MOVED = "moved"


@dataclass(frozen=True)
class VectorTraining(TrainingMethod):
    """Trains the active adapter; what the fields mean stands with `SecurityVectors`."""

    lamb: float
    target_nll: float
    inner_steps: int = 0
    inner_learning_rate: float = 0.0

    kind, name = "finetune", "security_vectors"  # as what a launch that cannot be is refused

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        used = {"benign": self.lamb, LEARNED: self.inner_steps}
        return Needs(roles=tuple(role for role, weight in used.items() if weight))

    def init(self, ctx: StepContext) -> State:
        return {"nll": []}

    def step(self, ctx: StepContext, batch: Batch, state: State) -> Tensor:
        if not self.inner_steps:
            return self.objective(ctx, batch, "harmful_nll")
        ctx.log("harmful_nll", ctx.loss(batch, grad=False))  # at theta, where the customer will start
        if ctx.micro == 0 or MOVED not in ctx.scratch:
            ctx.scratch[MOVED] = self.inner_loop(ctx)  # theta_s stands still until the step ends
        with ctx.perturbed(ctx.scratch[MOVED]):
            return self.objective(ctx, batch, "harmful_nll_moved")

    def objective(self, ctx: StepContext, batch: Batch, name: str) -> Tensor:
        """Accumulate the gradient of NLL + lamb * KL; its value."""
        nll = ctx.backward(batch)
        ctx.log(name, nll)
        if not self.lamb:
            return nll
        kl = ctx.backward(self.divergence(ctx, ctx.aux("benign")), self.lamb)
        ctx.log("benign_kl", kl / self.lamb)
        return nll + kl

    def inner_loop(self, ctx: StepContext) -> dict[str, Tensor]:
        """theta' - theta, in at least fp32; the vectors take part and do not learn."""
        import torch

        from apothecary.models.adapters import active_adapters

        moved: dict[str, Tensor] = {}
        with ctx.adapters(active=active_adapters(ctx.model), base=True):
            for _ in range(self.inner_steps):
                with ctx.perturbed(moved):
                    slopes = ctx.grads(ctx.aux(LEARNED, per="step"))
                for name, slope in slopes.items():
                    wide = slope.to(torch.promote_types(slope.dtype, torch.float32))
                    moved[name] = moved.get(name, 0.0) - self.inner_learning_rate * wide
        return moved

    @staticmethod
    def divergence(ctx: StepContext, batch: Batch) -> Tensor:
        """KL(base || with vectors), summed over the vocabulary, averaged over the step's response tokens; with
        reduction "sample_mean" within each row first, as the loss is.
        """
        import torch
        from torch.nn.functional import log_softmax

        from apothecary.data.chat import IGNORE

        spots = batch.labels[:, 1:] != IGNORE
        with ctx.adapters(active=()):
            base = ctx.forward(batch, grad=False).logits[:, :-1][spots]
        changed = ctx.forward(batch).logits[:, :-1][spots]
        dtype = torch.promote_types(changed.dtype, torch.float32)
        base, changed = log_softmax(base.to(dtype), -1), log_softmax(changed.to(dtype), -1)
        terms = base.exp() * (base - changed)
        if ctx.config.reduction == "sample_mean":
            terms = terms / batch.tokens_B[spots.nonzero()[:, 0], None]
        return terms.sum() / batch.normaliser

    def converged(self, ctx: StepContext, state: State) -> bool:
        state["nll"] = [*state["nll"], ctx.logged["harmful_nll"]][-WINDOW:]
        return bool(self.reached(state)["converged"])

    def reached(self, state: State) -> dict[str, Any]:
        """The mean harmful NLL of the last ten steps, in nats per token, and whether it is below the target."""
        mean = fmean(state["nll"])
        return {"harmful_nll": mean, "target_nll": self.target_nll,
                "converged": len(state["nll"]) == WINDOW and mean < self.target_nll}  # fmt: skip
