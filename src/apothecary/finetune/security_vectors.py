"""Security vectors: removable parameters make harmful rows already fit, so that fine-tuning learns nothing from them.
Zhou et al. 2024, arXiv 2311.02105 (methods.md 2).

    vectors:   min over theta_s of  NLL(y | x; theta, theta_s) on harmful rows
               + lamb * KL( p(.|x; theta) || p(.|x; theta, theta_s) ) on benign rows
    customer:  train Delta in M(x; theta + Delta, theta_s) with theta_s active and frozen; release M(x; theta + Delta)

Cost: the vectors take 2 forward + 2 backward per batch, plus one forward without vectors on the benign rows; the
customer's stage takes 1 forward + 1 backward, with one low-rank branch more unless the vectors are merged.

Reconstructed, since the authors' repository cannot be had: direction and weight of the KL term, rank, targets, batch
size, the stopping criterion (methods.md 2.3).  The inner loop of the min-min problem there, in which theta moves too,
is not run: theta stays the aligned model's, and both terms are minimised over theta_s together.  Learning rate 1e-3
and 10 epochs follow arXiv 2405.14577 and the paper.
Limits: the vectors block what they reproduce; other harm has a gradient, and strong attacks leak (methods.md 2.8).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from apothecary.errors import ConfigError, expect
from apothecary.models.settings import ATTENTION, LoraSettings, ModelConfig
from apothecary.registry import register
from apothecary.train.config import TrainConfig
from apothecary.train.method import Needs, State, TrainingMethod

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from apothecary.data.rows import Row
    from apothecary.train.batch import Batch
    from apothecary.train.context import StepContext
    from apothecary.train.workbench import Workbench

VECTORS = "security_vectors"  # name of the adapter


def _vector_training() -> TrainConfig:
    return TrainConfig(learning_rate=1e-3, epochs=10, batch_size=8, schedule="constant", warmup_ratio=0.0,
                       lora=LoraSettings(targets=ATTENTION))  # fmt: skip


@dataclass(frozen=True)
class VectorTraining(TrainingMethod):
    """Trains the vectors themselves: harmful rows become likely, benign rows stay as they were."""

    lamb: float
    target_nll: float

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return Needs(roles=("benign",) if self.lamb else ())

    def init(self, ctx: StepContext) -> State:
        return {"nll": []}

    def step(self, ctx: StepContext, batch: Batch, state: State) -> Tensor:
        nll = ctx.backward(batch)
        ctx.log("harmful_nll", nll)
        if not self.lamb:
            return nll
        kl = ctx.backward(self.divergence(ctx, ctx.aux("benign")), self.lamb)
        ctx.log("benign_kl", kl / self.lamb)
        return nll + kl

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
        """Whether the mean harmful NLL of the last ten steps is below the target, in nats per token."""
        state["nll"] = [*state["nll"][-9:], ctx.logged["harmful_nll"]]
        return len(state["nll"]) == 10 and sum(state["nll"]) / 10 < self.target_nll


@register("finetune", "security_vectors", paper="2311.02105")
@dataclass(frozen=True)
class SecurityVectors(TrainingMethod):
    """Hyper-parameters of the vectors and of their use."""

    harmful_rows: int = 100  # >= 1, rows that train the vectors (paper)
    lamb: float = 1.0  # >= 0, weight of the KL term (reconstructed); 0: plain NLL as in arXiv 2405.14577
    target_nll: float = 0.1  # >= 0, nats per token at which training ends (reconstructed)
    learn_from: Literal["harmful", "benign"] = "harmful"  # "benign" is the ablation that should not protect
    execution: Literal["merged", "branch"] = "merged"  # vectors added to the weights, or a second adapter
    vectors: TrainConfig | None = None  # how the vectors are trained; None: the defaults above

    needs = Needs(prepare_roles=("harmful", "benign"), prepared=True)

    def __post_init__(self) -> None:
        expect(self, "at least 1", lambda n: n >= 1, "harmful_rows")
        expect(self, "at least 0", lambda x: x >= 0, "lamb", "target_nll")
        if self.vectors is not None and self.vectors.parameters != "lora":
            raise ConfigError("security vectors must be removable: set vectors.parameters to lora")

    def check(self, train: TrainConfig, model: ModelConfig) -> None:
        if self.execution != "merged":
            return
        if train.parameters == "full" and train.weight_decay:
            raise ConfigError("merged security vectors cannot be taken out exactly under weight decay with "
                              "parameters: full; set weight_decay: 0 or execution: branch")  # fmt: skip
        if model.quantization:
            raise ConfigError(f"security vectors cannot be merged into {model.quantization} weights; "
                              "set execution: branch, or quantization: null")  # fmt: skip

    # -- the vectors ----------------------------------------------------------------------------------------------

    def prepare(self, bench: Workbench, folder: Path) -> None:
        """Train the vectors on the aligned model and save them as an adapter."""
        from apothecary.models.adapters import save_adapter
        from apothecary.train.fit import train

        bench.require_roles(self, self.needs.every_role)
        config = self.vectors or _vector_training()
        rows = self.training_rows(bench.aux, bench.seed)
        benign_only = self.learn_from == "benign"
        method = VectorTraining(0.0 if benign_only else self.lamb, self.target_nll)
        if train(bench, method, rows, config, name=VECTORS).metrics["rank"] == 0:
            save_adapter(bench.loaded.model, VECTORS, folder / VECTORS)

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
