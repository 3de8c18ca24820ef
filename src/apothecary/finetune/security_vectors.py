"""Security vectors: removable parameters make harmful rows already fit, so that fine-tuning learns nothing from them.
Zhou et al. 2024, arXiv 2311.02105 (methods.md 2).

    vectors:   min over theta_s of  NLL(y | x; theta, theta_s) on harmful rows
               + lamb * KL( p(.|x; theta) || p(.|x; theta, theta_s) ) on benign rows,
               at a theta that has itself taken K steps on harmful rows (train/vectors.py)
    customer:  train Delta in M(x; theta + Delta, theta_s) with theta_s active and frozen; release M(x; theta + Delta)

Cost: the customer's stage takes 1 forward + 1 backward per batch, with one low-rank branch more unless the vectors are
merged.  Before it, the vectors take 2 forward + 2 backward per batch, plus one forward without vectors on the benign
rows; K inner steps add K forward + K backward over the whole backbone, one forward, and three copies of the backbone
while they last (its change, a gradient, the saved bytes).

Neither the paper's text nor the authors' repository could be had (methods.md 2).  100 harmful rows come from the
paper's abstract; 10 epochs, the LoRA form and the min-min problem from a third party's analysis of it; learning rate
1e-3 and the plain loss, lamb: 0, from arXiv 2405.14577.
Deviation: the min-min problem is inner_steps above 0; by default theta stays where it is.
Reconstructed: rank, targets and alpha of the LoRA, batch size, constant schedule, no dropout, no weight decay; weight,
direction and positions of the KL term, and its benign rows; the stopping criterion; the length of the inner loop and
the loop itself: theta is every weight of the backbone, moved by plain gradient descent on harmful draws of its own, and
both terms are taken at the moved theta (methods.md 2.3).  The criterion reads the NLL where theta has not moved: long
inner steps make harmful rows fit without the vectors.
Base log-probabilities are not stored: they take rows x tokens x vocabulary numbers, hold for one theta only, and
save one forward of five passes.
Limits: the vectors block what they reproduce; other harm has a gradient, and strong attacks leak (methods.md 2.8).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from apothecary.errors import ConfigError, TrainingError, expect
from apothecary.models.settings import ATTENTION, LoraSettings, ModelConfig
from apothecary.registry import register
from apothecary.train.config import TrainConfig
from apothecary.train.method import Needs, State, TrainingMethod
from apothecary.train.vectors import LEARNED, VECTORS, VectorTraining

if TYPE_CHECKING:
    from pathlib import Path

    from apothecary.data.rows import Row
    from apothecary.train.context import StepContext
    from apothecary.train.workbench import Workbench

log = logging.getLogger(__name__)


def _vector_training() -> TrainConfig:
    return TrainConfig(learning_rate=1e-3, epochs=10.0, batch_size=8, schedule="constant", warmup_ratio=0.0,
                       lora=LoraSettings(targets=ATTENTION))  # fmt: skip


@register("finetune", "security_vectors", paper="2311.02105")
@dataclass(frozen=True)
class SecurityVectors(TrainingMethod):
    """Hyper-parameters of the vectors and of their use."""

    harmful_rows: int = 100  # >= 1, rows that train the vectors (paper's abstract)
    lamb: float = 1.0  # >= 0, weight of the KL term (reconstructed); 0: plain NLL as in arXiv 2405.14577
    inner_steps: int = 0  # K >= 0, steps of the backbone before each step of the vectors (reconstructed); 0: none
    inner_learning_rate: float = 1e-3  # eta > 0, of those steps (ours); much longer ones leave the vectors no work
    target_nll: float = 0.1  # >= 0, nats per token at which training ends (reconstructed)
    require_converged: bool = False  # whether vectors that miss the target stop the run; else they are reported (ours)
    learn_from: Literal["harmful", "benign"] = "harmful"  # "benign", the ablation that should not protect, ignores lamb
    execution: Literal["merged", "branch"] = "merged"  # vectors added to the weights, or a second adapter
    vectors: TrainConfig = field(default_factory=_vector_training)  # how the vectors are trained, at most

    needs = Needs(prepare_roles=("harmful", "benign"), prepared=True)  # with the defaults

    def __post_init__(self) -> None:
        roles = ("benign",) if self.learn_from == "benign" else ("harmful", "benign") if self.lamb else ("harmful",)
        object.__setattr__(self, "needs", replace(self.needs, prepare_roles=roles))
        expect(self, "at least 1", lambda n: n >= 1, "harmful_rows")
        expect(self, "at least 0", lambda x: x >= 0, "lamb", "target_nll", "inner_steps")
        expect(self, "above 0", lambda x: x > 0, "inner_learning_rate")
        if self.vectors.parameters != "lora":
            raise ConfigError("security vectors must be removable: set vectors.parameters to lora")
        if self.vectors.lora.dropout:
            raise ConfigError("dropout in security vectors would give harmful rows a gradient; set "
                              "vectors.lora.dropout: 0")  # fmt: skip

    def check(self, train: TrainConfig, model: ModelConfig) -> None:
        if model.quantization and self.inner_steps:
            raise ConfigError(f"inner steps of security vectors cannot move {model.quantization} weights; "
                              "set inner_steps: 0, or quantization: null")  # fmt: skip
        if self.execution != "merged":
            return
        if train.parameters == "full" and train.weight_decay:
            raise ConfigError("merged security vectors cannot be taken out exactly under weight decay with "
                              "parameters: full; set weight_decay: 0 or execution: branch")  # fmt: skip
        if model.quantization:
            raise ConfigError(f"security vectors cannot be merged into {model.quantization} weights; "
                              "set execution: branch, or quantization: null")  # fmt: skip

    # -- the vectors ----------------------------------------------------------------------------------------------

    def prepare(self, bench: Workbench, folder: Path) -> dict[str, Any]:
        """Train the vectors on the aligned model and save them as an adapter; tells how well they fit."""
        from apothecary.models.adapters import save_adapter
        from apothecary.train.fit import train

        bench.require_roles(self, self.needs.every_role)
        rows = self.training_rows(bench.aux, bench.seed)
        bench = replace(bench, source=bench.loaded, aux={**bench.aux, LEARNED: rows})
        lamb = 0.0 if self.learn_from == "benign" else self.lamb
        method = VectorTraining(lamb, self.target_nll, self.inner_steps, self.inner_learning_rate)
        result = train(bench, method, rows, self.vectors, name=VECTORS)
        reached = {**method.reached(result.state), "steps": result.metrics["steps"]}
        self.accept(reached)
        if result.metrics["rank"] == 0:
            save_adapter(bench.loaded.model, VECTORS, folder / VECTORS)
        return reached

    def accept(self, reached: Mapping[str, Any]) -> None:
        """Say so, or stop, where training ended without meeting its criterion."""
        if reached["converged"]:
            return
        missed = (f"security vectors ended at {reached['harmful_nll']:.2g} nats per token on harmful rows after "
                  f"{reached['steps']} steps, expected below {self.target_nll:g}; raise vectors.epochs or "
                  "vectors.learning_rate, lower lamb, or raise target_nll")  # fmt: skip
        if self.require_converged:
            raise TrainingError(f"{missed}; require_converged: false goes on with them")
        log.warning(missed)

    def training_rows(self, aux: Mapping[str, Sequence[Row]], seed: int) -> list[Row]:
        """A seeded choice of `harmful_rows` rows to learn from."""
        rows = list(aux[self.learn_from])
        if self.harmful_rows > len(rows):
            raise ConfigError(f"security vectors ask for {self.harmful_rows} {self.learn_from} rows, there are "
                              f"{len(rows)}; lower finetune.harmful_rows or name a larger source")  # fmt: skip
        return random.Random(seed).sample(rows, self.harmful_rows)

    # -- the customer's training ----------------------------------------------------------------------------------

    def init(self, ctx: StepContext) -> State:
        from apothecary.models import adapters, merging

        self.check(ctx.config, ModelConfig())  # quantised weights are refused where they are merged
        learning = adapters.active_adapters(ctx.model)
        assert ctx.prepared is not None
        ctx.model = adapters.load_adapter(ctx.model, VECTORS, ctx.prepared / VECTORS)
        if self.execution == "merged":
            ctx.scratch["undo"] = merging.merge_temporarily(ctx.model, VECTORS)
            adapters.activate(ctx.model, learning, learning)
        else:
            adapters.activate(ctx.model, [*learning, VECTORS], learning)
        return {}

    def finish(self, ctx: StepContext, state: State) -> None:
        """Take the vectors out: exactly for a customer's LoRA, to fp32 rounding for full parameters."""
        from apothecary.models import adapters

        if self.execution == "merged":
            ctx.scratch.pop("undo")()
        ctx.model = adapters.remove_adapter(ctx.model, VECTORS)
