"""An adapter added to the weights for a while, and taken out again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from apothecary.errors import ConfigError


def merge_temporarily(model: nn.Module, name: str) -> Callable[[], None]:
    """Add adapter `name` to the weights it targets, W' = W + s B A, and return the undo.

    The undo puts back the saved bytes of a weight that stayed frozen, and subtracts the fp32 delta from one that was
    trained in between, so that its change survives (methods.md 2.5).
    """
    undo: list[Callable[[], None]] = []
    for module in model.modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            weight: Tensor = module.get_base_layer().weight  # type: ignore[assignment]
            if not weight.is_floating_point():
                raise ConfigError("merged security vectors need plain weights, these are quantised; "
                                  "set execution: branch, or quantization: null")  # fmt: skip
            delta = module.get_delta_weight(name).detach()  # type: ignore[operator]
            undo.append(_shift(weight, delta))
    if not undo:
        raise ValueError(f"no layer carries adapter '{name}'")

    def undo_all() -> None:
        for one in undo:
            one()

    return undo_all


def _shift(weight: Tensor, delta: Tensor) -> Callable[[], None]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta = delta.to(wide)
    before = weight.detach().clone()
    with torch.no_grad():
        weight.copy_((weight.to(wide) + delta).to(weight.dtype))
    merged = weight.detach().clone()

    def undo() -> None:
        with torch.no_grad():
            if torch.equal(weight, merged):
                weight.copy_(before)
            else:
                weight.copy_((weight.to(wide) - delta).to(weight.dtype))

    return undo
