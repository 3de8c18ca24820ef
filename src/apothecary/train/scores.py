"""Gradient scores: inner products of each row's gradient with one direction in weight space.

    s_j = < v, grad l_j(theta) >,  l_j the mean (or the sum) of row j's response-token losses

The central difference (l_j(theta + eps u) - l_j(theta - eps u)) / (2 eps) * |v| along u = v / |v| costs two batched
forwards and no backward (methods.md 3.5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from apothecary.train.internals import global_norm, total

if TYPE_CHECKING:
    from apothecary.train.batch import Batch
    from apothecary.train.context import StepContext

Weights = dict[str, Tensor]
RowLoss = Literal["mean", "sum"]
STEP = 1e-2  # along the unit direction; trial: correlation with exact inner products above 0.999999


def combine(a: Weights, b: Weights, factor: float) -> Weights:
    """a + factor * b."""
    return {name: a[name] + factor * b[name] for name in a}


def scaled(a: Weights, factor: float | Tensor) -> Weights:
    return {name: factor * tensor for name, tensor in a.items()}


def inner(a: Weights, b: Weights) -> Tensor:
    """<a, b> over all tensors."""
    return total([(a[name] * b[name]).sum() for name in a])


def row_loss(ctx: StepContext, batch: Batch, kind: RowLoss) -> Tensor:
    """l_j of each row, [B], without a graph."""
    loss = ctx.per_sample_loss(batch)
    return loss * batch.tokens_B if kind == "sum" else loss


def central_scores(ctx: StepContext, batch: Batch, direction: Weights, kind: RowLoss) -> Tensor:
    """s_j of each row by a central difference, [B]."""
    norm = global_norm(direction.values())
    if norm == 0:
        return torch.zeros(len(batch.row_ids), device=ctx.device)
    unit = scaled(direction, STEP / norm)
    with ctx.perturbed(unit):
        above = row_loss(ctx, batch, kind)
    with ctx.perturbed(scaled(unit, -1.0)):
        below = row_loss(ctx, batch, kind)
    return (above - below) / (2 * STEP) * norm


def exact_scores(ctx: StepContext, batch: Batch, direction: Weights, kind: RowLoss) -> Tensor:
    """s_j of each row by one backward per row, [B]."""
    losses = ctx.per_sample_loss(batch, grad=True)
    if kind == "sum":
        losses = losses * batch.tokens_B
    parameters = ctx.parameters()
    scores = []
    for loss in losses:
        grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        scores.append(inner(dict(zip(parameters, grads, strict=True)), direction))
    return torch.stack(scores)
