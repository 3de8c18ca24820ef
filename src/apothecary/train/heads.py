"""Cross-entropy of hidden states through the model's head, without ever holding all of their logits.

Only positions that predict a response token meet the head.  The gradients of a chunk are formed together with its
logits, so that no logits are kept for the backward pass and none are computed twice.

Shape legend: B rows, T tokens, D hidden size, N supervised tokens of all states together, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from apothecary.data.chat import IGNORE
from apothecary.models.anatomy import LogitHead

if TYPE_CHECKING:
    from apothecary.train.batch import Batch
    from apothecary.train.context import StepContext

CHUNK = 512  # positions whose logits exist at a time


def head_loss(ctx: StepContext, head: LogitHead, states: Sequence[Tensor], batch: Batch) -> Tensor:
    """The batch's share of the step's loss (see `batch_loss`) where its logits come from hidden states [B, T, D] of a
    decoder layer; the mean over the given states.
    """
    spots = batch.labels[:, 1:] != IGNORE
    hidden_ND = torch.cat([state[:, :-1][spots] for state in states])
    targets_N = batch.labels[:, 1:][spots].repeat(len(states))
    weights_N = batch.weights(ctx.config.reduction)[spots].repeat(len(states)) / len(states)
    learning = [p for p in head.parameters() if p.requires_grad]
    with ctx.autocast():
        return _WeightedLoss.apply(head, targets_N, weights_N, hidden_ND, *learning)  # type: ignore[no-any-return]


class _WeightedLoss(torch.autograd.Function):
    """sum_n weight_n * cross-entropy(head(hidden_n), target_n)."""

    @staticmethod
    def forward(ctx: Any, head: LogitHead, targets_N: Tensor, weights_N: Tensor, hidden_ND: Tensor,
                *learning: Tensor) -> Tensor:  # fmt: skip
        total = hidden_ND.new_zeros((), dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
        grad_ND, grads = torch.empty_like(hidden_ND), [torch.zeros_like(p) for p in learning]
        for start in range(0, len(targets_N), CHUNK):
            part = slice(start, start + CHUNK)
            with torch.enable_grad():
                leaf = hidden_ND[part].detach().requires_grad_()
                logits = head(leaf).to(total.dtype)
                losses = functional.cross_entropy(logits, targets_N[part], reduction="none")
                loss = losses @ weights_N[part].to(total.dtype)
            grad_ND[part], *found = torch.autograd.grad(loss, [leaf, *learning], materialize_grads=True)
            for grad, more in zip(grads, found, strict=True):
                grad += more
            total += loss.detach()
        ctx.save_for_backward(grad_ND, *grads)
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:  # type: ignore[override]
        return None, None, None, *(slope.to(grad.dtype) * grad for grad in ctx.saved_tensors)
