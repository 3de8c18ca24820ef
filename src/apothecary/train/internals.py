"""Hooks on attention blocks, and parameters that are shifted and restored: the mechanics behind StepContext.

Every context manager here undoes what it did, also when an exception passes through it (methods.md 1.4, 1.5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from apothecary.errors import TrainingError


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
def entered(module: nn.Module, keep: Callable[[Tensor], Any]) -> Iterator[None]:
    """Show the first input of a module, which may come by name, to `keep` during the context."""

    def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        keep(inputs[0] if inputs else next(iter(named.values())))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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
def run_once(layers: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Run consecutive layers in the first pass only, without a graph.

    In later passes each of them gives at once what the last one gave, and leaves the random state that it left.
    """
    kept: list[Any] = []

    def shortcut(forward: Callable, last: bool) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            if kept:
                set_random_state(device, kept[1])
                return kept[0]
            with torch.no_grad():
                output = forward(*args, **kwargs)
            if last:
                kept.extend((output, random_state(device)))
            return output

        return run

    with ExitStack() as stack:
        for layer in layers:
            own = vars(layer).get("forward")  # where several devices share a model, that of its dispatcher
            stack.callback(partial(setattr, layer, "forward", own) if own else partial(delattr, layer, "forward"))
            layer.forward = shortcut(layer.forward, layer is layers[-1])
        yield


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
def exchanged(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters other values by name; on exit they hold their own tensors again, which nobody has touched."""
    own = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameters[name].data = value
        yield
    finally:
        for name, tensor in own.items():
            parameters[name].data = tensor


def moved(p: Tensor, delta: Tensor) -> Tensor:
    """p + delta, formed in at least fp32 and cast once."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    return (p.detach().to(dtype) + delta.to(dtype)).to(p.dtype)


def shifted(parameters: Mapping[str, nn.Parameter], deltas: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """Add deltas, and bring the parameters' own bytes back on exit."""
    return exchanged(parameters, {name: moved(parameters[name], delta) for name, delta in deltas.items()})


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


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The random state of the CPU and of a GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """Leave the random state as it was, so that the next pass draws the same dropout masks."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def refuse_double_backward(model: nn.Module) -> None:
    """TrainingError for a model whose attention has no second derivative."""
    kernel = getattr(getattr(model, "config", None), "_attn_implementation", None) or "eager"
    if kernel not in ("eager", "sdpa"):
        raise TrainingError(f"attention '{kernel}' has no second derivative; load the model with attention: sdpa")


@contextmanager
def double_backward(model: nn.Module) -> Iterator[None]:
    """Run what is to be differentiated twice: attention on the math kernel, as fused kernels have no second derivative.

    Raises TrainingError for a model that cannot do it.
    """
    refuse_double_backward(model)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if "derivative" not in str(error) and "differentiable" not in str(error):
            raise
        raise TrainingError(f"a layer of {type(model).__name__} has no second derivative "
                            f"({str(error).splitlines()[0]}); choose a method without Hessian") from error  # fmt: skip


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm over all entries of all tensors, in at least fp32."""
    squares = [t.to(torch.promote_types(t.dtype, torch.float32)).square().sum() for t in tensors]
    return total(squares).sqrt()


def total(values: Sequence[Tensor]) -> Tensor:
    """The sum of scalars, which may lie on several devices; on the first one's."""
    return torch.stack([value.to(values[0].device) for value in values]).sum()
