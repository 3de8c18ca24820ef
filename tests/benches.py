"""Workbenches over tiny models, for tests of training and of the methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import HIDDEN, PAD, tiny_model, tiny_tokenizer
from torch import Tensor, nn

from apothecary.data.rows import Row
from apothecary.models.adapters import add_adapter
from apothecary.models.load import LoadedModel
from apothecary.models.settings import LoraSettings, ModelConfig
from apothecary.train.batch import Batch, collate, weigh
from apothecary.train.config import TrainConfig
from apothecary.train.context import StepContext
from apothecary.train.method import State, TrainingMethod
from apothecary.train.workbench import Workbench


def make_rows(tag: str, n: int) -> list[Row]:
    """Rows of different lengths with short answers."""
    return [Row(f"{tag}{i}", (("user", f"{tag} {i} {'why ' * (i % 4)}"),), f"{tag[:3]} {i % 5}{'!' * (i % 3)}")
            for i in range(n)]  # fmt: skip


def make_pairs(n: int) -> list[Row]:
    """Rows of role `pairs`: refusals that are now shorter, now longer than the rejected opening."""
    return [Row(f"pair{i}", (("user", f"plan {i} {'why ' * (i % 3)}"),), f"No{', not that' * (i % 2)}.",
                rejected=f"Sure: {i}{'!' * (i % 3)}") for i in range(n)]  # fmt: skip


def float64_model(seed: int = 0) -> nn.Module:
    """GPT-2 with eager attention: the family whose forward stays in float64 throughout."""
    return tiny_model("gpt2", seed, torch.float64, attn_implementation="eager")


def working_lora(model: nn.Module, dropout: float = 0.0, targets: str | tuple[str, ...] = "all-linear") -> nn.Module:
    """The model in training mode with an adapter whose B is not zero, so that every factor has a gradient."""
    wrapped = add_adapter(model, "trained", LoraSettings(rank=4, dropout=dropout, targets=targets), 0)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return wrapped.train()


def make_bench(folder: Path, model: nn.Module | None = None, **options: Any) -> Workbench:
    aux = options.pop("aux", None) or {role: make_rows(role, 7) for role in ("harmful", "benign", "validation")}
    loaded = LoadedModel(model or tiny_model("llama"), tiny_tokenizer(), ModelConfig())  # type: ignore[arg-type]
    return Workbench(loaded, aux, options.pop("seed", 0), folder, **options)


def make_batch(bench: Workbench, rows: Sequence[Row], reduction: str = "token_mean", total: float = 0) -> Batch:
    rendered = bench.render(rows, TrainConfig())
    return collate(rendered, PAD, total or weigh(rendered, reduction))


def make_context(bench: Workbench, roles: Sequence[str] = (), **config: Any) -> StepContext:
    ctx = bench.context(TrainConfig(**config), roles)
    ctx.begin_step(1)
    ctx.begin_micro_step(0)
    return ctx


def count_hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference over all tensors, relative to the largest entry of each."""
    assert a.keys() == b.keys() and a
    return max(((a[k] - b[k]).abs().max() / b[k].abs().max().clamp_min(1e-12)).item() for k in a)


def largest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """`furthest` without gradients that are zero but for rounding, such as those of key biases."""
    real = {name for name, g in b.items() if g.abs().max() > 1e-12}
    return furthest({name: a[name] for name in real}, {name: b[name] for name in real})


def without_key_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's weights without what softmax cancels: AdamW makes steps of the rounding of its zero gradient."""
    keep = torch.arange(3 * HIDDEN) // HIDDEN != 1
    return {name: p[keep] if name.endswith("c_attn.bias") else p for name, p in weights.items()}


def parts(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """A batch as the references take it."""
    return batch.input_ids, batch.attention_mask, batch.labels


def random_way(parameters: Mapping[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=source, dtype=p.dtype) for name, p in parameters.items()}


def central_slope(ctx: StepContext, way: Mapping[str, Tensor], value: Callable[[], Tensor], eps: float = 1e-5) -> float:
    """The derivative of `value` in the parameters along `way`, by central differences."""

    def at(t: float) -> float:
        with ctx.perturbed({name: t * u for name, u in way.items()}):
            return value().item()

    return (at(eps) - at(-eps)) / (2 * eps)


class Recorder(TrainingMethod):
    """Runs another method's step and keeps the batches of each step and its complete gradient."""

    def __init__(self, method: TrainingMethod, to_float64: bool = False) -> None:
        self.method, self.to_float64 = method, to_float64
        self.name, self.kind, self.needs = method.__class__.__name__, "align", method.needs  # type: ignore[misc]
        self.gradients: list[dict[str, Tensor]] = []
        self.batches: list[list[Batch]] = []
        self.logged: list[dict[str, float]] = []

    def init(self, ctx: StepContext) -> State:
        state = self.method.init(ctx)
        if self.to_float64:  # LoRA tensors are made in fp32
            ctx.model.double()
        return state

    def step(self, ctx: StepContext, batch: Batch, state: State) -> Tensor:
        if ctx.micro == 0:
            self.batches.append([])
        self.batches[-1].append(batch)
        loss = self.method.step(ctx, batch, state)
        if ctx.last_micro_step:
            ctx.sum_gradients()
            grads = {name: p.grad for name, p in ctx.parameters().items()}
            self.gradients.append({name: g.clone() for name, g in grads.items() if g is not None})
        return loss

    def converged(self, ctx: StepContext, state: State) -> bool:
        self.logged.append(dict(ctx.logged))
        return self.method.converged(ctx, state)

    def finish(self, ctx: StepContext, state: State) -> None:
        self.method.finish(ctx, state)


class Halt(Exception):
    """Stands for a kill."""


def halt_at(call: int) -> Callable[[], None]:
    """A stop check that raises at its `call`-th call, counted from 0."""
    calls = iter(range(10**6))

    def stop() -> None:
        if next(calls) == call:
            raise Halt

    return stop
