"""Post-attack match: keep rows whose whole answer pulls the model where it still answers safely after an attack.  Ours.

    theta' = theta_0 - alpha * grad h(theta_0) / |grad h(theta_0)|,    v = grad f(theta')
    s_j    = < v, grad sum_t l_jt(theta_0) >,    the sum over the response tokens t of row j

f: mean token loss on validation rows (safe answers), h: on harmful rows, theta_0: the model before it is aligned.

Cost: one pass over the harmful and the validation rows, 2 forwards over the pool, no training.

It is Pharmacist's score without its warm-up, its learnt weights and its mean over tokens, and none of its claims carry
over.  Taken apart on three pools of the lab, at an AUC of 0.998 (docs/curation.md): the sum over tokens is worth 0.07
with all parameters and 0.08 with LoRA; a warm-up on a tenth of the pool costs 0.04 and 0.01, on 40 % 0.09 and 0.03; the
simulated attack earns nothing, alpha 0 and 0.3 being within 0.002 of 0.1.  LoRA needs no warm-up either: at B = 0 the
gradient of B alone carries the signal.  One small model and one kind of pool: elsewhere the attack may count for more.
Limits: rows are kept for being like the validation rows.  Where these are refusals, plain questions with good answers
rank low, and a model aligned on the kept rows alone refuses everything: add such rows after the selection, or have them
among the validation rows.  A sum favours long answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from apothecary.errors import expect
from apothecary.registry import register
from apothecary.train.config import WARM_UP, TrainConfig
from apothecary.train.method import Needs, Selector

if TYPE_CHECKING:
    from apothecary.data.rows import Row
    from apothecary.train.workbench import Workbench


@register("curate", "post_attack_match")
@dataclass(frozen=True)
class PostAttackMatch(Selector):
    """Settings; all defaults are ours."""

    alpha: float = 0.1  # >= 0, length of the simulated attack's step in weight space; 0: validation-gradient matching
    row_loss: Literal["sum", "mean"] = "sum"  # over the response tokens of a row; "mean" ranks cut answers high
    gradient: Literal["central", "exact"] = "central"  # s_j by two forwards, or by one backward per row
    sweep_batch_size: int = 32  # >= 1, rows scored at a time; changes nothing but speed and memory
    warmup_share: float = 0.0  # of the pool, in [0, 1], to train on before; cost signal on the lab
    warmup: TrainConfig = WARM_UP  # how; its parameters are those scored

    needs = Needs(roles=("validation", "harmful"))

    def __post_init__(self) -> None:
        expect(self, "at least 0", lambda x: x >= 0, "alpha")
        expect(self, "at least 1", lambda n: n >= 1, "sweep_batch_size")
        expect(self, "a share in [0, 1]", lambda x: 0 <= x <= 1, "warmup_share")

    def score(self, bench: Workbench, rows: Sequence[Row]) -> dict[str, float]:
        """s_j of each row; -inf for one that is dropped for its length."""
        from apothecary.data.rows import by_id
        from apothecary.train.scores import pool_scores
        from apothecary.train.simulated_attack import post_attack_gradient, whole_set
        from apothecary.train.warm_up import scoring, warm_up

        bench.require(self)
        rows = by_id(rows)
        warm_up(bench, rows, self.warmup, self.warmup_share)
        ctx = scoring(bench, self.warmup)
        harmful, validation = (whole_set(bench, ctx, role) for role in ("harmful", "validation"))
        target = post_attack_gradient(ctx, harmful, validation, self.alpha, normalise=True)
        return pool_scores(bench, ctx, rows, target, self.row_loss, self.gradient, self.sweep_batch_size)
