"""Hooks on attention blocks, and parameters that are shifted and restored: the mechanics behind StepContext.

Every context manager here undoes what it did, also when an exception passes through it (methods.md 1.4, 1.5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def hooked(modules: Mapping[int, nn.Module], change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Replace the first output of each module by `change(layer, output)` during the context."""

    def hook_for(layer: int) -> Callable:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(layer, output[0]), *output[1:])
            return change(layer, output)

        return hook

    with ExitStack() as stack:
        for layer, module in modules.items():
            stack.callback(module.register_forward_hook(hook_for(layer)).remove)
        yield


@contextmanager
def probe_zeros(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Add a zero tensor that requires grad to each module's output; yields them by layer after the forward.

    A recomputation under activation checkpointing meets the same tensors again.
    """
    zeros: dict[int, Tensor] = {}

    def add(layer: int, output: Tensor) -> Tensor:
        if layer not in zeros:
            dtype = torch.promote_types(output.dtype, torch.float32)
            zeros[layer] = torch.zeros(output.shape, dtype=dtype, device=output.device, requires_grad=True)
        return output + zeros[layer].to(output.dtype)

    with hooked(modules, add):
        yield zeros


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Turn `requires_grad` off, so that no parameter gradient is formed."""
    before = [(p, p.requires_grad) for p in parameters]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


@contextmanager
def saved(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Put back the saved bytes of parameters on exit."""
    copies = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(copies[name])


@contextmanager
def shifted(parameters: Mapping[str, nn.Parameter], deltas: Mapping[str, Tensor]) -> Iterator[None]:
    """Add deltas in at least fp32, cast once, and restore the saved bytes on exit."""
    moved = {name: parameters[name] for name in deltas}
    with saved(moved):
        with torch.no_grad():
            for name, p in moved.items():
                dtype = torch.promote_types(p.dtype, torch.float32)
                p.copy_((p.to(dtype) + deltas[name].to(dtype)).to(p.dtype))
        yield


@contextmanager
def gradients_aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Start with empty `.grad` and put the accumulated gradients back on exit."""
    before = [(p, p.grad) for p in parameters]
    try:
        for p, _ in before:
            p.grad = None
        yield
    finally:
        for p, grad in before:
            p.grad = grad


@contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """Leave the random state as it was, so that the next pass draws the same dropout masks."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm over all entries of all tensors, in at least fp32."""
    squares = [t.to(torch.promote_types(t.dtype, torch.float32)).square().sum() for t in tensors]
    return total(squares).sqrt()


def total(values: Sequence[Tensor]) -> Tensor:
    """The sum of scalars, which may lie on several devices; on the first one's."""
    return torch.stack([value.to(values[0].device) for value in values]).sum()
