"""Batches and their losses.

Shape legend: B rows, T tokens (padded), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from apothecary.data.chat import IGNORE, Rendered


@dataclass(frozen=True)
class Batch:
    """A padded micro-batch.

    `normaliser` is what its loss is divided by: the supervised tokens (or the rows, with reduction "sample_mean") of
    the whole optimiser step, over accumulated micro-batches and processes.
    """

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] 1 for tokens, 0 for padding
    labels: Tensor  # [B, T] token ids, IGNORE outside the response
    row_ids: tuple[str, ...]
    normaliser: float

    def to(self, device: torch.device) -> Batch:
        return replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("input_ids", "attention_mask", "labels")}

    @property
    def tokens_B(self) -> Tensor:
        """Supervised tokens of each row, at least 1 so that it can divide."""
        return (self.labels[:, 1:] != IGNORE).sum(1).clamp_min(1)

    @property
    def tail(self) -> int:
        """How many of the last positions it takes to predict every response token; at least 1."""
        unread = (self.labels[:, 1:] == IGNORE).all(0).long().cumprod(0).sum()
        return self.labels.shape[1] - int(unread)

    def singles(self) -> Iterator[Batch]:
        """Each row in a batch of its own, without its padding; the normaliser stays that of the step."""
        for i, row in enumerate(self.row_ids):
            length = int(self.attention_mask[i].sum())
            alone = {name: tensor[i : i + 1, :length] for name, tensor in self._tensors().items()}
            yield replace(self, **alone, row_ids=(row,))

    def share(self, reduction: str) -> float | Tensor:
        """These rows' part of the normaliser; the shares of a step add up to 1."""
        weight = len(self.row_ids) if reduction == "sample_mean" else (self.labels[:, 1:] != IGNORE).sum()
        return weight / self.normaliser

    def weights(self, reduction: str) -> Tensor:
        """What each next token's loss is multiplied by in the batch's share of the step's loss, [B, T-1]."""
        counted = (self.labels[:, 1:] != IGNORE).to(torch.float64) / self.normaliser
        return counted / self.tokens_B[:, None] if reduction == "sample_mean" else counted


def collate(rows: Sequence[Rendered], pad_id: int, normaliser: float, blank: Rendered | None = None) -> Batch:
    """Pad rows on the right.  Without rows, the batch is `blank` with every label ignored: a loss of exactly zero."""
    real = list(rows)
    if not real:
        if blank is None:
            raise ValueError("an empty batch needs a blank row")
        rows = [blank]
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORE)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        length = len(row.ids)
        ids[i, :length] = torch.tensor(row.ids)
        mask[i, :length] = 1
        if real:
            labels[i, row.start : length] = torch.tensor(row.ids[row.start :])
    return Batch(ids, mask, labels, tuple(row.row_id for row in real), normaliser)


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of several batches in one, padded to one width, for a common forward pass; it has no normaliser."""
    width = max(batch.input_ids.shape[1] for batch in batches)

    def widen(name: str, value: int) -> Tensor:
        parts = [getattr(batch, name) for batch in batches]
        return torch.cat([functional.pad(part, (0, width - part.shape[1]), value=value) for part in parts])

    return Batch(widen("input_ids", 0), widen("attention_mask", 0), widen("labels", IGNORE),
                 tuple(row for batch in batches for row in batch.row_ids), float("nan"))  # fmt: skip


def weigh(rows: Sequence[Rendered], reduction: str) -> float:
    """The share of rows in a normaliser: their supervised tokens, or their number."""
    return float(sum(row.supervised for row in rows) if reduction == "token_mean" else len(rows))


def token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy of every next token, [B, T-1], 0 where the label is ignored, in at least fp32."""
    logits = logits_BTV[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = labels_BT[:, 1:]
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view(targets.shape)


def row_losses(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy over the response tokens of each row, [B] (methods.md 1.2); the batch's tail will do."""
    return token_losses(logits_BTV, batch.labels[:, -logits_BTV.shape[1] :]).sum(1) / batch.tokens_B


def batch_loss(logits_BTV: Tensor, batch: Batch, reduction: str, weight: float | Tensor = 1.0) -> Tensor:
    """The batch's share of the step's loss; `weight` is one number, or one for each row [B]; the tail will do."""
    row_B = token_losses(logits_BTV, batch.labels[:, -logits_BTV.shape[1] :]).sum(1)
    if reduction == "sample_mean":
        row_B = row_B / batch.tokens_B
    return (weight * row_B).sum() / batch.normaliser
