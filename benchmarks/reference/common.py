"""What the obvious implementations have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Hook = Callable[[int, Tensor], Tensor | None]


def loss_of(model: nn.Module, batch) -> Tensor:
    """The library's own loss."""
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss


def decoder(model: nn.Module) -> Any:
    """The Llama under whatever wraps it."""
    return next(module for module in model.modules() if type(module).__name__ == "LlamaModel")


def attention(model: nn.Module) -> list[nn.Module]:
    return [layer.self_attn for layer in decoder(model).layers]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A dictionary of copies."""
    return {name: p.grad.detach().clone() for name, p in trainable(model).items() if p.grad is not None}


def norm_of(tensors) -> Tensor:
    return torch.stack([t.float().norm() for t in tensors]).norm()


@contextmanager
def hooks(modules: list[nn.Module], hook: Hook) -> Iterator[None]:
    """Call `hook(index, first output)` after each module; a tensor that it returns takes the output's place."""

    def after(index: int) -> Callable:
        def call(_module, _inputs, output):
            first = output[0] if isinstance(output, tuple) else output
            new = hook(index, first)
            return output if new is None else (new, *output[1:]) if isinstance(output, tuple) else new

        return call

    handles = [module.register_forward_hook(after(index)) for index, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
