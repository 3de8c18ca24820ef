"""SFT: supervised fine-tuning on the alignment rows, the baseline of every alignment method (methods.md 4.1).

    update with grad_theta f(theta),  f = mean cross-entropy over the response tokens

Cost: 1 forward + 1 backward per batch.

Papers train the baseline as their own method; Booster's authors: 5000 refusals, 20 epochs, batch_size 10, learning_rate
5e-4, a constant schedule, weight_decay 0.1, and LoRA of rank 32 and alpha 4 on q, k and v (methods.md 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass

from apothecary.registry import register
from apothecary.train.method import TrainingMethod


@register("align", "sft")
@dataclass(frozen=True)
class Sft(TrainingMethod):
    """Plain SFT; it has no hyper-parameter of its own."""
