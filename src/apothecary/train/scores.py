"""Gradient scores: inner products of each row's gradient with one direction in weight space.

    s_j = < v, grad l_j(theta) >,  l_j the mean (or the sum) of row j's response-token losses

The central difference (l_j(theta + eps u) - l_j(theta - eps u)) / (2 eps) * |v| along u = v / |v| costs two batched
forwards and no backward (methods.md 3.5); eps is checked on a few rows against exact inner products.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import reduce
from itertools import islice
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from apothecary.data.rows import Row
from apothecary.errors import TrainingError
from apothecary.models.merging import merges_exactly
from apothecary.train.batch import Batch, collate, weigh
from apothecary.train.internals import global_norm, total
from apothecary.train.sweep import sweep

if TYPE_CHECKING:
    from apothecary.train.context import StepContext
    from apothecary.train.workbench import Workbench

log = logging.getLogger(__name__)
Weights = dict[str, Tensor]
RowLoss = Literal["mean", "sum"]
Gradient = Literal["central", "exact"]
STEPS = (1e-2, 1e-3, 1e-1)  # along the unit direction, the usual one first
AGREEMENT = 0.999  # correlation with exact scores that a step must reach
PROBE = 16  # rows it is checked on


def combine(a: Weights, b: Weights, factor: float | Tensor) -> Weights:
    """a + factor * b."""
    return {name: a[name] + factor * b[name] for name in a}


def scaled(a: Weights, factor: float | Tensor) -> Weights:
    return {name: factor * tensor for name, tensor in a.items()}


def summed(parts: Iterable[Weights]) -> Weights:
    return reduce(lambda a, b: combine(a, b, 1.0), parts)


def inner(a: Weights, b: Weights) -> Tensor:
    """<a, b> over all tensors."""
    return total([(a[name] * b[name]).sum() for name in a])


def central_scores(ctx: StepContext, batch: Batch, direction: Weights, kind: RowLoss, step: float = STEPS[0]) -> Tensor:
    """s_j of each row, [B], by a central difference."""
    norm = global_norm(direction.values())
    if norm == 0:
        return torch.zeros(len(batch.row_ids), device=ctx.device)
    above_B, below_B = (_shifted_losses(ctx, batch, scaled(direction, side / norm), kind) for side in (step, -step))
    return (above_B - below_B) / (2 * step) * norm


def _shifted_losses(ctx: StepContext, batch: Batch, shift: Weights, kind: RowLoss) -> Tensor:
    """With adapters inside the weights, where these are fine enough for it: a forward without branches is quicker."""
    with ctx.perturbed(shift), ctx.merged() if merges_exactly(ctx.model) else nullcontext():
        return _losses(ctx, batch, kind)


def exact_scores(ctx: StepContext, batch: Batch, direction: Weights, kind: RowLoss) -> Tensor:
    """s_j of each row, [B], by a forward and a backward pass of its own."""
    parameters = ctx.parameters()
    slopes = []
    for one in batch.singles():
        grads = torch.autograd.grad(_losses(ctx, one, kind, grad=True).sum(), list(parameters.values()))
        slopes.append(inner(dict(zip(parameters, grads, strict=True)), direction))
    return torch.stack(slopes)


def row_scores(ctx: StepContext, batch: Batch, direction: Weights, kind: RowLoss, step: float | None) -> Tensor:
    """s_j of each row, [B]: with a step of the central difference, or exact without one."""
    if step is None:
        return exact_scores(ctx, batch, direction, kind)
    return central_scores(ctx, batch, direction, kind, step)


def _losses(ctx: StepContext, batch: Batch, kind: RowLoss, grad: bool = False) -> Tensor:
    losses_B = ctx.per_sample_loss(batch, grad)
    return losses_B * batch.tokens_B if kind == "sum" else losses_B


def probe(bench: Workbench, ctx: StepContext, rows: Sequence[Row]) -> Batch:
    """The rows that a step is checked on, drawn from the whole pool."""
    order = random.Random(f"{bench.seed}:probe").sample(range(len(rows)), len(rows))
    drawn = list(islice(bench.render_each((rows[i] for i in order), ctx.config), PROBE))
    return collate(drawn, bench.pad_id, weigh(drawn, ctx.config.reduction)).to(ctx.device)


def checked_step(ctx: StepContext, batch: Batch, direction: Weights, kind: RowLoss) -> float:
    """The step whose central differences agree best with exact scores on these rows.

    Raises TrainingError where none does: in half precision, say, or where the loss is not smooth.
    """
    exact_B = exact_scores(ctx, batch, direction, kind)
    found = {step: agreement(central_scores(ctx, batch, direction, kind, step), exact_B) for step in STEPS}
    best = max(found, key=found.__getitem__)
    log.info(f"central differences: step {best:g}, correlation {found[best]:.6f} with exact scores on "
             f"{len(batch.row_ids)} rows")  # fmt: skip
    if not found[best] >= AGREEMENT:
        raise TrainingError(f"central differences correlate only {found[best]:.4f} with exact scores, expected "
                            f"{AGREEMENT} or more; set gradient: exact, which takes a backward per row")  # fmt: skip
    return best


def agreement(central_B: Tensor, exact_B: Tensor) -> float:
    """Their correlation; 1 - relative error where all rows score alike, so that there is none.  -1 for what is not
    finite, and for differences that tell no rows apart which exact scores do."""
    largest = exact_B.abs().max()
    if exact_B.max() - exact_B.min() <= 1e-6 * largest:
        found = 1.0 - (central_B - exact_B).abs().max() / largest.clamp_min(1e-30)
    else:
        found = torch.stack([central_B, exact_B]).double().corrcoef()[0, 1]
    return found.item() if found.isfinite() else -1.0


def pool_scores(bench: Workbench, ctx: StepContext, rows: Sequence[Row], direction: Weights, kind: RowLoss,
                gradient: Gradient, batch_size: int = 32) -> dict[str, float]:  # fmt: skip
    """s_j of every row by id, in one pass over the pool."""
    step = checked_step(ctx, probe(bench, ctx, rows), direction, kind) if gradient == "central" else None
    return sweep(bench, ctx, rows, lambda batch: row_scores(ctx, batch, direction, kind, step), ctx.config,
                 batch_size=batch_size)  # fmt: skip
