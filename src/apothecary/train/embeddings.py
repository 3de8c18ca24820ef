"""Rows as vectors: the model's own last hidden states (after the final norm), averaged over chosen tokens.

    all       every token of prompt and response
    prompt    the prompt and the opening of the answer; what follows cannot change them in a causal model
    response  the answer and its eos
    last      the answer's last token, the one before eos
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from apothecary.data.chat import IGNORE
from apothecary.train.sweep import features

if TYPE_CHECKING:
    import numpy as np

    from apothecary.data.rows import Row
    from apothecary.train.batch import Batch
    from apothecary.train.config import TrainConfig
    from apothecary.train.context import StepContext
    from apothecary.train.workbench import Workbench

Tokens = Literal["all", "prompt", "response", "last"]


def embed(bench: Workbench, ctx: StepContext, rows: Sequence[Row], config: TrainConfig, name: str,
          tokens: Tokens = "all", normalise: bool = True, batch_size: int = 32) -> np.ndarray:  # fmt: skip
    """A vector for each row, [N, D] on disk, of length 1 if `normalise`; NaN for a row dropped for its length."""

    def measure(batch: Batch) -> Tensor:
        return mean_hidden(ctx, batch, tokens, normalise)

    head: Any = ctx.plain.get_output_embeddings()  # type: ignore[operator]
    return features(bench, ctx, rows, measure, config, name, head.in_features, batch_size)


def mean_hidden(ctx: StepContext, batch: Batch, tokens: Tokens, normalise: bool) -> Tensor:
    """[B, D], in at least fp32."""
    hidden_BTD = ctx.last_hidden(batch)
    hidden_BTD = hidden_BTD.to(torch.promote_types(hidden_BTD.dtype, torch.float32))
    chosen_BT = chosen(batch, tokens).to(hidden_BTD.dtype)
    mean_BD = torch.einsum("btd,bt->bd", hidden_BTD, chosen_BT) / chosen_BT.sum(1, keepdim=True)
    return functional.normalize(mean_BD, dim=1) if normalise else mean_BD


def chosen(batch: Batch, tokens: Tokens) -> Tensor:
    """Which tokens count, [B, T]."""
    real_BT, answer_BT = batch.attention_mask.bool(), batch.labels != IGNORE
    if tokens == "all":
        return real_BT
    if tokens == "prompt":
        return real_BT & ~answer_BT
    if tokens == "response":
        return answer_BT
    last_B1 = real_BT.sum(1, keepdim=True) - 2
    return torch.arange(real_BT.shape[1], device=real_BT.device) == last_B1
