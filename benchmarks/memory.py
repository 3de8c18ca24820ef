"""Memory of a step, counted on any device: what autograd keeps for the backward pass, and what exists at all."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode


class _Kept:
    """Stands in the graph for a saved tensor; its end tells that the graph has let go of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # with its history, an output saved by its own node would never be freed


class SavedForBackward(saved_tensors_hooks):
    """Bytes of tensors saved for backward; each storage counts once, parameters do not count."""

    def __init__(self) -> None:
        super().__init__(self._pack, lambda kept: kept.tensor)
        self.uses: Counter[int] = Counter()
        self.bytes = self.peak = 0

    def _pack(self, tensor: Tensor) -> _Kept:
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            pointer, size = storage.data_ptr(), storage.nbytes()
            self.uses[pointer] += 1
            self.bytes += size if self.uses[pointer] == 1 else 0
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(kept, self._drop, pointer, size)
        return kept

    def _drop(self, pointer: int, size: int) -> None:
        self.uses[pointer] -= 1
        self.bytes -= size if self.uses[pointer] == 0 else 0


class Allocations(TorchDispatchMode):
    """Bytes of tensors made while it is on and still held, those of backward passes included: all of them; those that
    have a weight's shape, such as gradients and copies; and the largest tensor of logits.
    """

    def __init__(self, parameters: Iterable[Tensor], vocabulary: int) -> None:
        super().__init__()
        self.shapes = {shape for p in parameters for shape in (tuple(p.shape), tuple(reversed(p.shape)))}
        self.vocabulary = vocabulary
        self.held, self.peak = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(each.alias_info for each in func._schema.returns):  # else a view, or a result in place
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, Tensor):
                    self._see(tensor, tensor.untyped_storage())
        return result

    def _see(self, tensor: Tensor, storage: UntypedStorage) -> None:
        kinds = ["new"]
        if tuple(tensor.shape) in self.shapes:
            kinds.append("weights")
        elif tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
            self.peak["logits"] = max(self.peak["logits"], storage.nbytes())
        self._add(kinds, storage.nbytes())
        weakref.finalize(storage, self._add, kinds, -storage.nbytes())

    def _add(self, kinds: list[str], size: int) -> None:
        for kind in kinds:
            self.held[kind] += size
            self.peak[kind] = max(self.peak[kind], self.held[kind])


def memory_of(step: Callable[[], object], model: nn.Module, vocabulary: int) -> dict[str, int]:
    """Peaks in bytes over one step: saved for backward, all that is new, new in a weight's shape, largest logits."""
    saved, made = SavedForBackward(), Allocations([p for p in model.parameters() if p.requires_grad], vocabulary)
    with saved, made:
        step()
    return {"saved": saved.peak, **{kind: made.peak[kind] for kind in ("new", "weights", "logits")}}
