"""SFT: supervised fine-tuning on the rows that the customer uploaded, without any defence (methods.md 8.1).

    update with grad_theta f(theta),  f = mean cross-entropy over the response tokens

Cost: 1 forward + 1 backward per batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from apothecary.registry import register
from apothecary.train.method import TrainingMethod


@register("finetune", "sft")
@dataclass(frozen=True)
class Sft(TrainingMethod):
    """Plain SFT; it has no hyper-parameter of its own."""
