"""Where the decoder layers, attention blocks, MLP blocks and the head of a causal language model are.

Found by structure and class name, never by the class itself, so that no model family is a special case; what cannot
be told apart is an error, because a method that perturbs nothing looks exactly like a defence that does not help.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from apothecary.errors import ModelError
from apothecary.models.adapters import plain

_HELPER = re.compile("Norm|Rotary|Embedding|Dropout|Mask|Bias")  # parts of a block that carry its name


def _named(module: nn.Module, word: str) -> list[nn.Module]:
    """Children whose class name contains `word`; where there are none, grandchildren."""

    def matches(children: list[nn.Module]) -> list[nn.Module]:
        names = [(type(child).__name__, child) for child in children]
        return [child for name, child in names if word in name and not _HELPER.search(name)]

    children = list(module.children())
    return matches(children) or matches([inner for child in children for inner in child.children()])


def _only(found: list[nn.Module], name: str, layer: nn.Module, what: str, mark: str) -> nn.Module:
    """The one block of a layer."""
    if len(found) != 1:
        classes = ", ".join(type(block).__name__ for block in found) or "none"
        raise ModelError(
            f"layer '{name}' ({type(layer).__name__}) has {len(found)} {what} blocks ({classes}), expected exactly "
            f"one child whose class name {mark}; use a model with one per layer"
        )
    return found[0]


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, layer) of each decoder layer, first to last; names are those of `model.named_modules()`.

    The list of layers is the outermost `nn.ModuleList` that is as long as the text configuration says; adapters may
    be attached.  Raises ModelError where there is none or more than one.
    """
    inner = plain(model)
    depth = getattr(inner.config.get_text_config(), "num_hidden_layers", None)
    decoder = inner.get_decoder() or inner  # leaves the vision tower of a multimodal model out
    within = {id(module) for module in decoder.modules()}
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer, _ in found)  # experts of a layer, say
        if isinstance(module, nn.ModuleList) and len(module) == depth and id(module) in within and not nested:
            found.append((name, module))
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise ModelError(
            f"{type(inner).__name__} has {len(found)} lists of {depth} layers ({names}), expected exactly one list of "
            "decoder layers; use a decoder-only language model"
        )
    name, layers = found[0]
    return [(f"{name}.{index}", layer) for index, layer in enumerate(layers)]


def attention_blocks(model: nn.Module) -> dict[int, nn.Module]:
    """The attention block of each decoder layer, by layer number; its (first) output has shape [batch, tokens, hidden].

    Raises ModelError, naming the layer, unless exactly one child has a class name that contains "Attention".
    """
    blocks = {}
    for index, (name, layer) in enumerate(decoder_layers(model)):
        blocks[index] = _only(_named(layer, "Attention"), name, layer, "attention", 'contains "Attention"')
    return blocks


def attention_linears(model: nn.Module) -> list[str]:
    """Names, in the plain model, of the linear layers inside attention blocks; those that carry adapters count too."""
    names = {id(module): name for name, module in plain(model).named_modules()}
    found = []
    for block in attention_blocks(model).values():
        start = len(found)
        carriers = {id(part) for part in block.modules() if isinstance(part, BaseTunerLayer)}
        inside = {id(inner) for part in block.modules() if id(part) in carriers for inner in part.modules()} - carriers
        for part in block.modules():
            if isinstance(part, (nn.Linear, Conv1D, BaseTunerLayer)) and id(part) not in inside:
                found.append(names[id(part)])
        if len(found) == start:
            raise ModelError(
                f"the attention block '{names[id(block)]}' ({type(block).__name__}) has no linear layer, expected its "
                "projections; name the layers as targets"
            )
    return found


def mlp_blocks(model: nn.Module) -> dict[int, nn.Module]:
    """The MLP of each decoder layer, by layer number; its output has shape [batch, tokens, hidden].

    Where a layer spreads its MLP over bare linear layers (OPT), the last of them, named `fc2`.  Raises ModelError,
    naming the layer, where neither exists or several do.
    """
    blocks = {}
    for index, (name, layer) in enumerate(decoder_layers(model)):
        found = _named(layer, "MLP") or [child for label, child in layer.named_children() if label == "fc2"]
        blocks[index] = _only(found, name, layer, "MLP", 'contains "MLP" or that is named fc2')
    return blocks


@dataclass(frozen=True)
class LogitHead:
    """What turns the output of the last decoder layer, or of any other, into logits: softcap(linear(norm(hidden)))."""

    parts: tuple[nn.Module, ...]  # final norm, projection (OPT-350m) and output embedding, those that the model has
    softcap: float | None  # c * tanh(logits / c) (Gemma)

    def __call__(self, hidden: Tensor) -> Tensor:
        for part in self.parts:
            hidden = part(hidden)
        return hidden if self.softcap is None else self.softcap * torch.tanh(hidden / self.softcap)

    def parameters(self) -> list[nn.Parameter]:
        return [p for part in self.parts for p in part.parameters()]


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm between the last decoder layer and the head; None where there is none (OPT-350m).

    It stands beside the list of layers; where several do (BLOOM), it is the one after the list.
    """
    parent, layers = _stack(model)
    children = list(parent.named_children())
    norms = [(name, child) for name, child in children if "Norm" in type(child).__name__]
    if len(norms) > 1:
        after = [name for name, _ in children].index(layers)
        norms = [(name, child) for name, child in children[after + 1 :] if "Norm" in type(child).__name__]
    if len(norms) > 1:
        raise ModelError(
            f"{type(parent).__name__} has {len(norms)} norms after its layers "
            f"({', '.join(name for name, _ in norms)}), expected one before the head; use another model"
        )
    return norms[0][1] if norms else None


def logit_head(model: nn.Module) -> LogitHead:
    """The head of the model, found by structure and compared with the model's own logits of two tokens.

    Raises ModelError where they differ, as with a model that scales its logits.
    """
    inner = plain(model)
    softcap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
    embedding = inner.get_output_embeddings()
    if embedding is None:
        raise ModelError(f"{type(inner).__name__} has no output embedding, expected a causal language model")
    found = (final_norm(model), getattr(_stack(model)[0], "project_out", None), embedding)
    head = LogitHead(tuple(part for part in found if part is not None), softcap)
    _refuse_other_logits(inner, decoder_layers(model)[-1][1], head)
    return head


def _stack(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the list of decoder layers, and the list's name in it."""
    parent, _, name = decoder_layers(model)[0][0].rpartition(".")[0].rpartition(".")
    return model.get_submodule(parent), name


def _refuse_other_logits(model: Any, last: nn.Module, head: LogitHead) -> None:
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    training, handle = model.training, last.register_forward_hook(keep)
    try:
        with torch.no_grad():
            model.eval()
            ids = torch.tensor([[0, 1]], device=model.get_input_embeddings().weight.device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            again = head(seen[0]).to(logits)
    finally:
        handle.remove()
        model.train(training)
    tolerance = 100 * torch.finfo(seen[0].dtype).eps * logits.abs().max()
    if not (again - logits).abs().max() <= tolerance:
        raise ModelError(
            f"{type(model).__name__} does not form its logits by final norm, output embedding and softcap alone; "
            "a method that reads hidden states through the head needs a model that does"
        )
