"""An adapter added to the weights for a while, and taken out again; nothing is saved in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from apothecary.errors import ConfigError, ModelError
from apothecary.models.adapters import active_adapters, is_embedding, is_tied

_MERGED: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()  # linear layer -> what its weight now holds


def refuse_merged(model: nn.Module) -> None:
    """Raise ModelError while an adapter is in the weights for a while: what is saved then could not do without it."""
    held = {name: None for module in model.modules() for name in _MERGED.get(module, ())}
    if held:
        raise ModelError(f"adapter '{next(iter(held))}' is merged into the weights for a while, expected weights "
                         "without it; take it out before the model is saved")  # fmt: skip


def merge_temporarily(model: nn.Module, name: str) -> Callable[[], None]:
    """Add adapter `name` to the weights it targets, W' = W + s B A, and return the undo.

    The undo puts back the saved bytes of a weight that stayed frozen, and subtracts the fp32 delta from one that was
    trained in between, so that its change survives (methods.md 2.5).
    """
    carriers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer) and name in m.scaling]
    if not carriers:
        raise ValueError(f"no layer carries adapter '{name}'")
    if not all(carrier.get_base_layer().weight.is_floating_point() for carrier in carriers):
        raise ConfigError("merged security vectors need plain weights, these are quantised; "
                          "set execution: branch, or quantization: null")  # fmt: skip
    if any(is_tied(model, carrier) for carrier in carriers):
        raise ConfigError("merged security vectors on a tied embedding would change the input and the output side "
                          "alike; set execution: branch")  # fmt: skip
    undo: list[tuple[nn.Module, Callable[[], None]]] = []
    for carrier in carriers:
        layer = carrier.get_base_layer()
        _MERGED.setdefault(layer, []).append(name)
        undo.append((layer, _shift(layer.weight, carrier.get_delta_weight(name).detach())))

    def undo_all() -> None:
        for layer, take_out in undo:
            take_out()
            _MERGED[layer].remove(name)

    return undo_all


def _shift(weight: Tensor, delta: Tensor) -> Callable[[], None]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta = delta.to(wide)
    before = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(_sum(weight, delta))
    merged = weight.detach().clone()

    def undo() -> None:
        with torch.no_grad():
            if torch.equal(weight, merged):
                weight.copy_(before)
            else:
                weight.copy_((weight.to(wide) - delta).to(weight.dtype))

    return undo


@torch.no_grad()
def merged_weights(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """W + s B A of these adapters by the parameter's name in `model`, in W's dtype; the model stays as it is.

    Raises ConfigError for an adapter that no weight stands for.
    """
    found = {}
    for key, layer in model.named_modules():
        held = [name for name in names if name in layer.scaling] if isinstance(layer, LoraLayer) else []
        if held:
            _refuse_unlike_weights(model, layer, key, held)
            delta: Any = sum(layer.get_delta_weight(name) for name in held)  # type: ignore[operator]
            found[f"{key}.base_layer.weight"] = _sum(layer.get_base_layer().weight, delta)  # type: ignore[arg-type]
    return found


def merges_exactly(model: nn.Module) -> bool:
    """Whether the active adapters can stand in the weights, but for rounding in fp32 or finer."""
    names = active_adapters(model)
    try:
        for key, layer in model.named_modules():
            held = [name for name in names if name in layer.scaling] if isinstance(layer, LoraLayer) else []
            if held:
                _refuse_unlike_weights(model, layer, key, held)
                if torch.finfo(layer.get_base_layer().weight.dtype).bits < 32:  # type: ignore[arg-type, union-attr]
                    return False
    except ConfigError:
        return False
    return bool(names)


def _refuse_unlike_weights(model: nn.Module, layer: Any, key: str, names: Sequence[str]) -> None:
    problem = ""
    if any(isinstance(layer.lora_dropout[name], nn.Dropout) for name in names):
        problem = "has dropout"
    elif any(name in layer.lora_variant for name in names):
        problem = "is not plain LoRA"
    elif not layer.get_base_layer().weight.is_floating_point():
        problem = "lies on quantised weights"
    elif is_embedding(model, layer):
        problem = "lies on an embedding, which another one may share"
    if problem:
        raise ConfigError(f"the adapter on '{key}' {problem}, so that no weight stands for it; run it as a branch")


def _sum(weight: Tensor, delta: Tensor) -> Tensor:
    """W + delta, formed in at least fp32 and rounded once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + delta.to(wide)).to(weight.dtype)
