"""T-Vaccine as in Lslland/T-Vaccine, for given layers: a whole first pass, then only those layers train.

The authors also checkpoint the other layers, which spares memory and costs a forward; that is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from benchmarks.reference.common import attention, decoder, hooks, loss_of, trainable
from benchmarks.reference.vaccine import drift


def step(model: nn.Module, batch, layers: Sequence[int], rho: float = 3.0) -> None:
    modules = [attention(model)[layer] for layer in layers]
    offsets = drift(model, batch, modules, rho)
    active = {id(p) for layer in layers for p in decoder(model).layers[layer].parameters()}
    others = [p for p in trainable(model).values() if id(p) not in active]
    for p in others:
        p.requires_grad_(False)
    with hooks(modules, lambda index, output: output + offsets[index]):
        loss_of(model, batch).backward()
    for p in others:
        p.requires_grad_(True)
