"""Booster as in git-disl/Booster: each gradient copied into a dictionary, theta~ reached and left by adding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.reference.common import gradients, loss_of, norm_of, trainable


@torch.no_grad()
def add(model: nn.Module, direction: dict[str, Tensor], factor) -> None:
    for name, p in trainable(model).items():
        p += factor * direction[name]


def step(model: nn.Module, batch, harmful, lamb: float = 5.0, alpha: float = 0.1) -> None:
    loss_of(model, harmful).backward()
    q = gradients(model)
    model.zero_grad()
    length = alpha / (norm_of(q.values()) + 1e-7)
    add(model, q, -length)
    loss_of(model, harmful).backward()
    after = gradients(model)
    model.zero_grad()
    add(model, q, length)
    loss_of(model, batch).backward()
    for name, p in trainable(model).items():
        p.grad.add_(lamb * (q[name] - after[name]))  # type: ignore[union-attr]
