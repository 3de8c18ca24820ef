"""T-Vaccine: Vaccine on a few layers at a time, drawn by how much harmful rows pull at them.
Liu et al. 2024, arXiv 2410.09760.

    every `rescore` steps:    s_l = mean over harmful rows i of ||dh_i/de_l||,   p_l = s_l / (s_1 + .. + s_L)
    every `resample` steps:   S <- `gamma` layers, drawn without replacement with probabilities p
    g_l = df/de_l,   eps_l = rho * g_l / (||(g_l, l in S)|| + 1e-7) for l in S, else 0
    update the parameters of the layers in S with grad f(theta; e + eps)

f: loss on the alignment batch; h_i: mean token loss of a harmful row; e_l: output of the l-th attention block.  Nothing
outside S moves, by weight decay neither; with full parameters embeddings, final norm and head stay as they are.

Cost: 2 forward + 2 backward per batch down to the lowest layer of S; what lies below runs forward once and is not
differentiated.  The first backward forms activation gradients only, the second parameter gradients in S alone.  Each
`rescore` steps, one pass more over `score_rows` harmful rows.

The authors' code trains on 2000 refusals, beside 200 harmful rows, with learning_rate 1e-3, 20 epochs, batch_size 10,
schedule cosine, warmup_ratio 0.1, weight_decay 0.1, max_length 200, and LoRA of rank 8, alpha 1 and dropout 0.1 on all
linear layers (methods.md 4.3).

Reconstructed from the authors' code (Lslland/T-Vaccine), since the formulas of the paper could not be read: everything
but the idea.  Deviations from that code: scores average many rows in place of one; layers outside S are frozen whole,
with their MLPs; accumulated gradients survive the passes, which draw the same dropout masks; harmful rows come from one
iterator.  `norm_scope="sample"` is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from apothecary.errors import ConfigError, TrainingError, expect
from apothecary.registry import register
from apothecary.train.method import Needs, State, TrainingMethod

if TYPE_CHECKING:
    from torch import Tensor

    from apothecary.train.batch import Batch
    from apothecary.train.context import StepContext


@register("align", "t_vaccine", paper="2410.09760")
@dataclass(frozen=True)
class TVaccine(TrainingMethod):
    """Hyper-parameters of T-Vaccine."""

    rho: float = 3.0  # >= 0, radius of the perturbation over the layers of S, tokens and rows (authors' code)
    gamma: int = 8  # >= 1 and at most the model's layers: how many of them S holds (authors' code)
    resample: int = 20  # >= 1, optimiser steps between draws of S (authors' code)
    rescore: int = 200  # >= 1, optimiser steps between scores of the layers (authors' code)
    score_rows: int = 32  # >= 1, harmful rows that a score averages, up to the end of a batch (ours; code: 1)
    norm_scope: Literal["batch", "sample"] = "batch"  # one radius for the micro-batch, or one for each row (ours)

    needs = Needs(roles=("harmful",))

    def __post_init__(self) -> None:
        expect(self, "at least 0", lambda x: x >= 0, "rho")
        expect(self, "at least 1", lambda n: n >= 1, "gamma", "resample", "rescore", "score_rows")

    def init(self, ctx: StepContext) -> State:
        from apothecary.models.anatomy import attention_blocks

        depth, rows = len(attention_blocks(ctx.model)), len(ctx.auxiliary.rows["harmful"])
        if self.gamma > depth:
            raise ConfigError(f"t_vaccine draws gamma = {self.gamma} layers at a time, the model has {depth}; "
                              f"set align.gamma to at most {depth}")  # fmt: skip
        if self.score_rows > rows:
            raise ConfigError(f"t_vaccine scores layers on {self.score_rows} harmful rows, there are {rows}; "
                              "lower align.score_rows or name a larger source")  # fmt: skip
        return {"steps": 0, "probabilities": [], "layers": []}

    def step(self, ctx: StepContext, batch: Batch, state: State) -> Tensor:
        from apothecary.train.drift import worst_drift

        if ctx.micro == 0:
            self.choose(ctx, state)
            ctx.trainable(state["layers"])
        with ctx.reusing(min(state["layers"])):
            drift = worst_drift(ctx.hidden_grads(batch, state["layers"]), self.rho, self.norm_scope)
            with ctx.hidden_offset(drift):
                return ctx.backward(batch)

    def choose(self, ctx: StepContext, state: State) -> None:
        """p and S of the step that begins, the same on every process."""
        if state["steps"] % self.rescore == 0:
            state["probabilities"] = self.probabilities(ctx).tolist()
        if state["steps"] % self.resample == 0:
            state["layers"] = self.draw(ctx, state["probabilities"], state["steps"])
        state["steps"] += 1

    def probabilities(self, ctx: StepContext) -> Tensor:
        """p of every layer, [L], from the next harmful rows of all processes."""
        import torch
        from torch.nn.functional import pad

        sums: list[Tensor] = []  # of the scores and, in the last place, of the rows
        while sum(float(found[-1]) for found in sums) < self.score_rows:
            scores_BL = self.scores(ctx, ctx.aux("harmful", per="step"))
            sums.append(ctx.sum_over_processes(pad(scores_BL, (0, 1), value=1.0).sum(0)))
        s_L = torch.stack(sums).sum(0)[:-1]
        p_L = s_L / s_L.sum()
        if not (p_L > 0).all():
            raise TrainingError(f"harmful rows give the layers probabilities {p_L.tolist()}, expected numbers above 0; "
                                "lower the learning rate, or inspect these rows")  # fmt: skip
        return p_L

    @staticmethod
    def scores(ctx: StepContext, harmful: Batch) -> Tensor:
        """||dh_i/de_l|| of each row and layer, [B, L]; the loss of a batch is the sum over i of share_i * h_i."""
        from apothecary.train.drift import row_norms

        share_B = harmful.weights(ctx.config.reduction).sum(1)
        norms_BL = row_norms(ctx.hidden_grads(harmful)).double() / share_B[:, None]
        return norms_BL[: len(harmful.row_ids)]  # an empty share holds a blank row

    def draw(self, ctx: StepContext, probabilities: list[float], step: int) -> list[int]:
        """S in the order of depth; it follows from seed and step alone."""
        import torch

        p_L = torch.tensor(probabilities, dtype=torch.float64, device=ctx.device)
        return sorted(torch.multinomial(p_L, self.gamma, generator=ctx.generator("t_vaccine", step)).tolist())
