"""SEAL: row weights, learnt while a model fits the weighted pool and safe rows.  Shen et al. 2024, arXiv 2410.07471.

    sigma(w) = N softmax(w) over the pool;  for a batch of B pool rows and one of safe rows:
    theta: descend on  ul * mean l_safe(theta) + (1 - ul) * (1/B) sum_j sigma_j(w) l_j(theta),   ul falls every epoch
    w:     descend on  (1/B) sum_j sigma_j(w) l_j(theta),  l_j held fixed: rows that theta fits well gain weight

l: mean loss over a row's response tokens.  The safe rows are those of role "validation"; a row's score is its w.

Cost: 1 forward + 1 backward per batch, over the pool's rows and the safe ones together (2 forwards where one width for
both would cost more in padding); N floats three times.

The paper's penalty form is  ul * f(theta) + (1 - ul) * (sum sigma_i l_i(theta) - min_theta' sum sigma_i l_i(theta')).
The authors' code (hanshen95/SEAL) leaves the inner minimum out and moves w at full rate, also at ul = 1, where theta
does not see the pool at all.  Both are kept: this is what their results were made with.  They keep 80 % of the rows.
Deviations from that code: scores go with row ids (there, weights are numbered after over-long rows were dropped, and
rows are picked by their number before); safe rows are cycled, while the pool is gone through whole (there, the shorter
of the two ends the epoch, and incomplete batches are dropped).
The paper ranks a customer's rows; on a pool of safety rows it is the same method with another purpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from apothecary.errors import ConfigError, expect
from apothecary.models.settings import LoraSettings
from apothecary.registry import register
from apothecary.train.config import TrainConfig
from apothecary.train.method import Needs, Selector, State, TrainingMethod

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from apothecary.data.rows import Row
    from apothecary.train.batch import Batch
    from apothecary.train.context import StepContext
    from apothecary.train.workbench import Workbench


def _theta() -> TrainConfig:
    return TrainConfig(learning_rate=1e-5, epochs=3, batch_size=64, schedule="constant", warmup_ratio=0.0,
                       betas=(0.9, 0.95), max_length=2048, reduction="sample_mean",
                       lora=LoraSettings(rank=16, alpha=16, targets=("q_proj", "v_proj")))  # fmt: skip


@register("curate", "seal", paper="2410.07471")
@dataclass(frozen=True)
class Seal(Selector):
    """Hyper-parameters; all defaults are those of the authors' script for Llama-3."""

    ul: float = 1.0  # in [0, 1], weight of the safe rows in the first epoch
    ul_decay: float = 0.03  # >= 0, taken off after each epoch, down to 0 (0.02 for Pythia)
    eta_w: float = 5e-3  # > 0, Adam's learning rate on w (4e-3 for Pythia)
    betas: tuple[float, float] = (0.9, 0.95)  # Adam's on w
    clip: float = 10.0  # > 0, largest norm of the gradient of w
    init: float = 0.1  # w of every row at the start
    theta: TrainConfig = field(default_factory=_theta)  # training of the model; epochs are those of w too

    needs = Needs(roles=("validation",))

    def __post_init__(self) -> None:
        expect(self, "a number in [0, 1]", lambda x: 0 <= x <= 1, "ul")
        expect(self, "at least 0", lambda x: x >= 0, "ul_decay")
        expect(self, "above 0", lambda x: x > 0, "eta_w", "clip")
        expect(self, "two numbers in [0, 1)", lambda pair: all(0 <= x < 1 for x in pair), "betas")
        if self.theta.reduction != "sample_mean":
            raise ConfigError(f"theta.reduction is {self.theta.reduction}, expected sample_mean: a weight is a row's")

    def score(self, bench: Workbench, rows: Sequence[Row]) -> dict[str, float]:
        """w of each row; -inf for one that is dropped for its length."""
        from apothecary.data.rows import by_id
        from apothecary.train.fit import train
        from apothecary.train.on_demand import OnDemand

        bench.require(self)
        pool = OnDemand(bench, by_id(rows), self.theta)
        training = WeightedTraining(self, {row: place for place, row in enumerate(pool.ids())})
        return pool.scores(train(bench, training, pool, self.theta, name="selector").state["w"])


@dataclass(frozen=True)
class WeightedTraining(TrainingMethod):
    """One training in which theta and w move together; w is its state."""

    seal: Seal
    places: Mapping[str, int]  # of each row id in w

    kind, name, needs = "curate", "seal", Seal.needs

    def init(self, ctx: StepContext) -> State:
        from apothecary.train.row_weights import fresh

        return fresh(ctx, len(self.places), self.seal.init)

    def step(self, ctx: StepContext, batch: Batch, state: State) -> Tensor:
        from apothecary.train.batch import row_losses
        from apothecary.train.row_weights import gradient, sigma

        both, chosen = (ctx.aux("validation"), batch), [self.places[row] for row in batch.row_ids]
        safe_B, pool_B = (row_losses(out.logits, part) for out, part in zip(ctx.forward_each(both), both, strict=True))
        pool_B = pool_B[: len(chosen)]  # a share without rows holds a blank one
        upper, lower = safe_B.sum() / both[0].normaliser, (sigma(state["w"], chosen) * pool_B).sum() / batch.normaliser
        ctx.log("safe_loss", upper.detach())
        ctx.log("weighted_loss", lower.detach())
        ul = self.upper_weight(state["steps"])
        loss = ctx.backward(ul * upper + (1 - ul) * lower)

        slope_N = gradient(state["w"], chosen, pool_B.detach(), batch.normaliser)
        ctx.scratch["slope"] = slope_N + ctx.scratch.pop("slope", 0.0)
        if ctx.last_micro_step:
            self.move(state, ctx.sum_over_processes(ctx.scratch.pop("slope")))
        return loss

    def upper_weight(self, steps: int) -> float:
        """ul of the epoch that comes after these steps."""
        epoch = steps // -(-len(self.places) // self.seal.theta.batch_size)
        return max(0.0, self.seal.ul - self.seal.ul_decay * epoch)

    def move(self, state: State, slope_N: Tensor) -> None:
        from apothecary.train.row_weights import descend

        clipped_N = slope_N * (self.seal.clip / slope_N.norm().clamp_min(self.seal.clip))
        descend(state, clipped_N, self.seal.eta_w, self.seal.betas)
