"""Vaccine: alignment under the worst-case drift of hidden embeddings.  Huang et al. 2024, arXiv 2402.01109.

    g_l = df/de_l,   eps_l = rho * g_l / (||(g_1 .. g_L)|| + 1e-7),   update with grad_theta f(theta; e + eps)

e_l is the output of the l-th attention block; all eps_l come from the same clean pass.

Cost: 2 forward + 2 backward per batch; the first backward forms activation gradients only.

Deviations from the authors' code (git-disl/Vaccine): accumulated gradients survive the probe, both passes draw the same
dropout masks, the norm is taken in fp32, and attention blocks are found by structure.  `norm_scope="sample"` is ours;
only "batch" is the paper's, defined on one device's micro-batch (methods.md 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from apothecary.errors import expect
from apothecary.registry import register
from apothecary.train.method import State, TrainingMethod

if TYPE_CHECKING:
    from torch import Tensor

    from apothecary.train.batch import Batch
    from apothecary.train.context import StepContext

EPS = 1e-7  # authors' code: keeps a zero gradient at zero


@register("align", "vaccine", paper="2402.01109")
@dataclass(frozen=True)
class Vaccine(TrainingMethod):
    """Hyper-parameters of Vaccine."""

    rho: float = 2.0  # >= 0, radius of the perturbation over layers, tokens and rows (authors' code)
    norm_scope: Literal["batch", "sample"] = "batch"  # one radius for the micro-batch, or one for each row

    def __post_init__(self) -> None:
        expect(self, "at least 0", lambda x: x >= 0, "rho")

    def step(self, ctx: StepContext, batch: Batch, state: State) -> Tensor:
        grads = ctx.hidden_grads(batch)
        with ctx.hidden_offset(self.perturbation(grads)):
            return ctx.backward(batch)

    def perturbation(self, grads: dict[int, Tensor]) -> dict[int, Tensor]:
        """eps_l for every layer, [B, T, D]; their joint norm is rho (for each row with scope "sample")."""
        sample = self.norm_scope == "sample"
        squares = [g.square().sum((1, 2), keepdim=True) if sample else g.square().sum() for g in grads.values()]
        scale = self.rho / (sum(square.to(squares[0].device) for square in squares) ** 0.5 + EPS)
        return {layer: scale.to(grad.device) * grad for layer, grad in grads.items()}
