"""Vaccine: alignment under the worst-case drift of hidden embeddings.  Huang et al. 2024, arXiv 2402.01109.

    g_l = df/de_l,   eps_l = rho * g_l / (||(g_1 .. g_L)|| + 1e-7),   update with grad_theta f(theta; e + eps)

e_l is the output of the l-th attention block; all eps_l come from the same clean pass.

Cost: 2 forward + 2 backward per batch; the first backward forms activation gradients only.  With probe "merged" the
clean pass runs on the weights W + s B A in place of branches beside W, at the price of one more copy of those weights:
the same gradients but for rounding.

The authors' code trains on 2000 rows with learning_rate 1e-3, 50 epochs, batch_size 5, schedule cosine, warmup_ratio
0.1, weight_decay 0.1, max_length 200, and LoRA of rank 8, alpha 1 and dropout 0.1 on all linear layers (methods.md 1.3,
4.1); the paper's text names attention alone.

Deviations from the authors' code (git-disl/Vaccine): accumulated gradients survive the probe, both passes draw the same
dropout masks, the norm is taken in fp32, and attention blocks are found by structure.  `norm_scope="sample"` is ours;
only "batch" is the paper's, defined on one device's micro-batch (methods.md 4.2).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from apothecary.errors import ConfigError, expect
from apothecary.registry import register
from apothecary.train.method import State, TrainingMethod

if TYPE_CHECKING:
    from torch import Tensor

    from apothecary.models.settings import ModelConfig
    from apothecary.train.batch import Batch
    from apothecary.train.config import TrainConfig
    from apothecary.train.context import StepContext


@register("align", "vaccine", paper="2402.01109")
@dataclass(frozen=True)
class Vaccine(TrainingMethod):
    """Hyper-parameters of Vaccine."""

    rho: float = 2.0  # >= 0, radius of the perturbation over layers, tokens and rows (authors' code)
    norm_scope: Literal["batch", "sample"] = "batch"  # one radius for the micro-batch, or one for each row (ours)
    probe: Literal["adapter", "merged"] = "adapter"  # how LoRA takes part in the clean pass; merged: faster (ours)

    def __post_init__(self) -> None:
        expect(self, "at least 0", lambda x: x >= 0, "rho")

    def check(self, train: TrainConfig, model: ModelConfig) -> None:
        if self.probe != "merged":
            return
        if train.parameters != "lora" or train.lora.dropout:
            raise ConfigError(f"probe: merged needs LoRA without dropout, got parameters: {train.parameters}, "
                              f"lora.dropout: {train.lora.dropout}; set align.probe: adapter")  # fmt: skip
        if model.quantization:
            raise ConfigError(f"probe: merged cannot add LoRA to {model.quantization} weights; "
                              "set align.probe: adapter, or quantization: null")  # fmt: skip

    def step(self, ctx: StepContext, batch: Batch, state: State) -> Tensor:
        with ctx.hidden_offset(self.perturbation(ctx, batch)):
            return ctx.backward(batch)

    def perturbation(self, ctx: StepContext, batch: Batch) -> dict[int, Tensor]:
        """eps_l for every layer, [B, T, D]; their joint norm is rho (for each row with scope "sample")."""
        from apothecary.train.drift import worst_drift

        with ctx.merged() if self.probe == "merged" else nullcontext():
            return worst_drift(ctx.hidden_grads(batch), self.rho, self.norm_scope)
