"""One learnable number for each row of a pool: what the selectors that learn weights share (Pharmacist, SEAL).

    sigma_j(w) = N softmax(w)_j,  so that the mean weight is 1
    d/dw_i of (1/B) sum_j sigma_j c_j  =  N/B gamma_i (c_i [i in batch] - sum_j gamma_j c_j),   gamma = softmax(w)

The state is a plain dictionary, so that it can be saved with a checkpoint: w, Adam's two moments and its step count.
Every step moves every weight, as the softmax spans the pool.
Shape legend: N rows of the pool, B rows of a batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apothecary.train.method import State

if TYPE_CHECKING:
    from apothecary.train.context import StepContext

EPS = 1e-8  # Adam's usual guard; also that of SEAL's optimiser


def fresh(ctx: StepContext, rows: int, start: float) -> State:
    """Every row at `start`, in at least fp32: one row's update is below bf16 resolution (methods.md 3.4)."""
    dtype = torch.promote_types(next(ctx.model.parameters()).dtype, torch.float32)
    w_N = torch.full((rows,), start, dtype=dtype, device=ctx.device)
    return {"w": w_N, "first": torch.zeros_like(w_N), "second": torch.zeros_like(w_N), "steps": 0}


def sigma(w_N: Tensor, chosen: Sequence[int]) -> Tensor:
    """sigma_j of the chosen rows, [B]."""
    return (w_N.softmax(0) * len(w_N))[list(chosen)]


def gradient(w_N: Tensor, chosen: Sequence[int], coefficient_B: Tensor, rows: float) -> Tensor:
    """d/dw of (1/rows) sum_j sigma_j(w) c_j over the chosen rows, [N]: the softmax Jacobian written out."""
    gamma_N = w_N.softmax(0)
    places_B = torch.tensor(chosen, dtype=torch.long, device=w_N.device)
    c_N = torch.zeros_like(w_N).index_add_(0, places_B, coefficient_B.to(w_N.dtype))
    return len(w_N) / rows * gamma_N * (c_N - (gamma_N * c_N).sum())


def descend(state: State, gradient_N: Tensor, learning_rate: float, betas: tuple[float, float] | None) -> None:
    """One step on w without weight decay: of Adam, or without betas along the gradient itself."""
    state["steps"] += 1
    if betas is None:
        state["w"] = state["w"] - learning_rate * gradient_N
        return
    state["first"] = betas[0] * state["first"] + (1 - betas[0]) * gradient_N
    state["second"] = betas[1] * state["second"] + (1 - betas[1]) * gradient_N.square()
    first_N = state["first"] / (1 - betas[0] ** state["steps"])
    second_N = state["second"] / (1 - betas[1] ** state["steps"])
    state["w"] = state["w"] - learning_rate * first_N / (second_N.sqrt() + EPS)


def save(state: State, file: Path) -> None:
    """Write the state; the file is whole or the one before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, file)


def load(file: Path, device: torch.device) -> State | None:
    """What `save` wrote last, if anything."""
    return torch.load(file, map_location=device, weights_only=True) if file.exists() else None
