"""What is measured: random Llamas of several shapes, and batches in which every row has the same length."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from apothecary.data.chat import Rendered
from apothecary.finetune.security_vectors import VECTORS
from apothecary.models import adapters
from apothecary.models.settings import ATTENTION, LoraSettings
from apothecary.train.auxiliary import Auxiliary
from apothecary.train.batch import Batch, collate, weigh
from apothecary.train.config import TrainConfig
from apothecary.train.context import StepContext

LAYOUTS = ("lora", "full")
ROLES = ("harmful", "benign", "pairs")
RANK = 8


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama and of its batches; half of each row's tokens are supervised."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    rows: int = 10
    tokens: int = 200


SHAPES = {
    "tiny": Shape(32, 48, 2, 4, 96, rows=3, tokens=12),
    "small": Shape(256, 688, 4, 4, 4096),
    "cpu": Shape(512, 1376, 24, 8, 4096),
    "7b": Shape(4096, 11008, 32, 32, 32000),
}


@dataclass
class Subject:
    """A model under a layout of parameters, with its batches and its optimiser, whose learning rate is 0: every step
    does the whole work and leaves the weights for the next one.
    """

    shape: Shape
    ctx: StepContext
    batch: Batch
    optimiser: torch.optim.Optimizer
    draws: Iterator[int] = field(default_factory=lambda: count(1))  # numbers for random choices, each once

    def begin(self) -> None:
        self.ctx.begin_step(1)
        self.ctx.begin_micro_step(0)

    def update(self) -> None:
        """What follows the passes of a step: clipping, AdamW, emptied gradients."""
        nn.utils.clip_grad_norm_([p for group in self.optimiser.param_groups for p in group["params"]], 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.ctx.end_step()


def make_subject(shape: Shape, layout: str, device: str = "cpu", dtype: str = "fp32", seed: int = 0) -> Subject:
    torch.manual_seed(seed)
    model: Any = _llama(shape, device, torch.bfloat16 if dtype == "bf16" and layout == "lora" else torch.float32)
    folder = Path(tempfile.mkdtemp(prefix="vectors-"))
    model = _with_vectors_saved(model, folder)
    if layout == "lora":
        model = adapters.add_adapter(model, "trained", LoraSettings(rank=RANK), seed)
        _randomise(model, "trained")
    else:
        model.requires_grad_(True)
    config = TrainConfig(batch_size=shape.rows, parameters="lora" if layout == "lora" else "full",
                         lora=LoraSettings(rank=RANK), precision="bf16" if dtype == "bf16" else "fp32")  # fmt: skip
    rows = {role: _rows(shape, role) for role in ROLES}
    auxiliary = Auxiliary(rows, shape.rows, 0, config.reduction, seed)
    ctx = StepContext(model.train(), auxiliary, config, prepared=folder)
    align = _rows(shape, "align")
    batch = collate(align, 0, weigh(align, config.reduction)).to(ctx.device)
    return Subject(shape, ctx, batch, _optimiser(ctx))


def _llama(shape: Shape, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, vocab_size=shape.vocabulary, max_position_embeddings=max(256, shape.tokens),
        pad_token_id=0, bos_token_id=1, eos_token_id=1, use_cache=False)  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def _with_vectors_saved(model: nn.Module, folder: Path) -> nn.Module:
    """Security vectors for the customer's stage, as that method trains them: on the attention's linear layers."""
    wrapped = adapters.add_adapter(model, VECTORS, LoraSettings(rank=RANK, targets=ATTENTION), 1)
    _randomise(wrapped, VECTORS)
    adapters.save_adapter(wrapped, VECTORS, folder / VECTORS)
    return adapters.remove_adapter(wrapped, VECTORS)


@torch.no_grad()
def _randomise(model: nn.Module, name: str) -> None:
    """B away from zero, so that A has a gradient."""
    for key, p in adapters.adapter_parameters(model, name).items():
        if "lora_B" in key:
            p.normal_(0, 0.02)


def _rows(shape: Shape, tag: str) -> list[Rendered]:
    source = torch.Generator().manual_seed(len(tag))
    prompts, answers, others = (
        torch.randint(2, shape.vocabulary, (shape.rows, shape.tokens // 2), generator=source).tolist() for _ in range(3)
    )

    def row(i: int, answer: list[int], rejected: Rendered | None = None) -> Rendered:
        return Rendered(f"{tag}{i}", (*prompts[i], *answer), len(prompts[i]), rejected)

    return [row(i, answers[i], row(i, others[i]) if tag == "pairs" else None) for i in range(shape.rows)]


def _optimiser(ctx: StepContext) -> torch.optim.Optimizer:
    parameters = list(ctx.parameters().values())
    optimiser = torch.optim.AdamW(parameters, lr=0.0, fused=True)  # the Trainer's default
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimiser.step()  # its state is made here, not in the first step that is measured
    optimiser.zero_grad()
    return optimiser
