"""The drift of hidden embeddings that raises the loss most: what Vaccine and its successors train under.

    eps_l = rho * g_l / (||(g_1 .. g_L)|| + 1e-7)

g_l is the gradient of the loss with respect to the output of the l-th attention block; the norm spans the layers that
are given and all tokens of the micro-batch, where padding has no gradient and so takes no part of the radius.
Shape legend: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["batch", "sample"]  # one radius for the micro-batch, or one for each row
EPS = 1e-7  # code of Vaccine and of T-Vaccine: keeps a zero gradient at zero


def worst_drift(grads: Mapping[int, Tensor], rho: float, scope: Scope) -> dict[int, Tensor]:
    """eps_l of every given layer, [B, T, D]; their joint norm is rho, with scope "sample" that of each row."""
    norms_BL = row_norms(grads)
    norm = torch.linalg.vector_norm(norms_BL) if scope == "batch" else norms_BL.norm(dim=1)[:, None, None]
    scale = rho / (norm + EPS)
    return {layer: scale.to(g.device) * g for layer, g in grads.items()}


def row_norms(grads: Mapping[int, Tensor]) -> Tensor:
    """||g_l|| of each row and layer, [B, L], on the first layer's device."""
    norms = [torch.linalg.vector_norm(g, dim=(1, 2)) for g in grads.values()]
    return torch.stack([norm.to(norms[0].device) for norm in norms], dim=1)
