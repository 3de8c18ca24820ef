"""Vaccine as in git-disl/Vaccine: a whole first pass, its weight gradients thrown away."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.reference.common import attention, hooks, loss_of, norm_of


def drift(model: nn.Module, batch, modules: list[nn.Module], rho: float) -> list[Tensor]:
    """eps_l of each module, after a pass that forms every gradient."""
    outputs: list[Tensor] = []

    def keep(_index: int, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    with hooks(modules, keep):
        loss_of(model, batch).backward()
    grads = [output.grad for output in outputs if output.grad is not None]
    model.zero_grad()
    scale = rho / (norm_of(grads) + 1e-7)
    return [(scale * grad).to(grad.dtype) for grad in grads]


def step(model: nn.Module, batch, rho: float = 2.0) -> None:
    modules = attention(model)
    offsets = drift(model, batch, modules, rho)
    with hooks(modules, lambda index, output: output + offsets[index]):
        loss_of(model, batch).backward()
