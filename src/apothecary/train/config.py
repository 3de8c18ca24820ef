"""How a model is trained: settings only, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from apothecary.errors import expect
from apothecary.models.settings import LoraSettings


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation of one stage: AdamW, with defaults for a small LoRA run."""

    learning_rate: float = 1e-3
    epochs: float = 3.0
    max_steps: int = -1  # optimiser steps; overrides epochs when positive
    batch_size: int = 16  # rows per optimiser step, over all processes and accumulated micro-batches
    accumulation: int = 1  # micro-batches that a process takes for one step
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_ratio: float = 0.05  # share of the steps, in [0, 1)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0 turns clipping off
    betas: tuple[float, float] = (0.9, 0.999)
    parameters: Literal["lora", "full"] = "lora"
    lora: LoraSettings = field(default_factory=LoraSettings)
    reduction: Literal["token_mean", "sample_mean"] = "token_mean"  # methods.md 1.2
    max_length: int | None = None  # tokens; None: the model's context
    over_long: Literal["error", "drop"] = "error"
    precision: Literal["fp32", "bf16"] = "fp32"  # autocast; trainable parameters stay fp32
    gradient_checkpointing: bool = False
    deterministic: bool = False  # bitwise determinism on a GPU, slower
    aux_batch_size: int | None = None  # rows per step of each auxiliary role; None: batch_size
    save_every: int = 100  # optimiser steps between checkpoints; 0: none
    keep_checkpoints: int = 2
    log_every: int = 10

    def __post_init__(self) -> None:
        expect(self, "at least 1", lambda n: n >= 1, "batch_size", "accumulation", "log_every", "keep_checkpoints")
        expect(self, "null or at least 1", lambda n: n is None or n >= 1, "aux_batch_size")
        expect(self, "null or at least 2", lambda n: n is None or n >= 2, "max_length")
        expect(self, "a finite number above 0", lambda x: x > 0 and math.isfinite(x), "learning_rate")
        expect(self, "a share in [0, 1)", lambda x: 0 <= x < 1, "warmup_ratio")
        expect(self, "at least 0", lambda x: x >= 0, "weight_decay", "max_grad_norm", "save_every")
        expect(self, "two numbers in [0, 1)", lambda pair: all(0 <= x < 1 for x in pair), "betas")
        if self.max_steps <= 0:
            expect(self, "above 0 and finite, or max_steps above 0", lambda x: x > 0 and math.isfinite(x), "epochs")


# How selectors train to theta_0 before they score rows (the rate and the batch of T-Vaccine).
WARM_UP = TrainConfig(learning_rate=1e-3, epochs=1, batch_size=10, schedule="constant", warmup_ratio=0.0)
