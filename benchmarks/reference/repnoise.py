"""RepNoise as in domenicrosati/representation-noising, its hooks removed: two forwards, all logits of all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.reference.common import decoder, hooks, loss_of


def token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    return functional.cross_entropy(logits_BTV[:, :-1].float().flatten(0, 1), labels_BT[:, 1:].flatten())


def mmd(x_BF: Tensor, y_BF: Tensor) -> Tensor:
    """MMD^2 with five Gaussian kernels around the mean squared distance of distinct rows."""
    rows_RF, half = torch.cat([x_BF, y_BF]).float(), len(x_BF)
    distances_RR = (rows_RF[:, None] - rows_RF[None]).square().sum(-1)
    spread = distances_RR.detach().sum() / (len(rows_RF) * (len(rows_RF) - 1))
    kernel_RR = torch.stack([torch.exp(-distances_RR / (spread * 2.0 ** (i - 2))) for i in range(5)]).sum(0)
    within = kernel_RR[:half, :half] + kernel_RR[half:, half:]
    return (within - kernel_RR[:half, half:] - kernel_RR[half:, :half]).mean()


@contextmanager
def mlp_outputs(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """The output of each layer's MLP, by layer, once a forward has run."""
    outputs: dict[int, Tensor] = {}
    with hooks([layer.mlp for layer in decoder(model).layers], outputs.__setitem__):
        yield outputs


def step(model: nn.Module, batch, refusal, harmful, noise: Callable[[int], Tensor], alpha: float = 1.0,
         beta: float = 0.001, watched=mlp_outputs) -> None:  # fmt: skip
    """`noise(layer)` has the shape of that layer's MLP output; `watched` collects those outputs."""
    norm = decoder(model).norm
    head: Any = next(module for name, module in model.named_modules() if name.endswith("lm_head"))
    stability = loss_of(model, batch)
    with watched(model) as outputs:
        states = model(input_ids=harmful.input_ids, attention_mask=harmful.attention_mask,
                       output_hidden_states=True).hidden_states  # fmt: skip
    losses = [token_loss(head(norm(state)), harmful.labels) for state in states[:-1]]
    losses.append(token_loss(head(states[-1]), harmful.labels))  # the last one is normed already
    mask = (refusal.input_ids != harmful.input_ids)[..., None]
    distances = [mmd((mask * out).flatten(1), (mask * noise(layer)).flatten(1)) for layer, out in outputs.items()]
    (stability + beta * torch.stack(distances).mean() - alpha * torch.stack(losses).mean().log1p()).backward()
