"""How a model is trained: settings only, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

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
