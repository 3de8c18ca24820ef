"""Gradients of every row of a batch from one forward and one backward, and their random projection.

A linear layer y = W x has, for row b, dl_b/dW = sum_t (dl_b/dy_bt) x_bt^T; LoRA's A and B are such layers.

Shape legend: B rows, T tokens, I inputs, O outputs, P projected size.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from apothecary.errors import TrainingError
from apothecary.train.batch import Batch
from apothecary.train.context import StepContext

Named = tuple[str, Tensor]  # a parameter's name and something of shape [B, ...]
SIGNS = 4096  # rows of the sign matrix that are made at a time
_BITS = torch.tensor([[1.0 if byte >> bit & 1 else -1.0 for bit in range(8)] for byte in range(256)])


def row_gradients(ctx: StepContext, batch: Batch) -> Iterator[Named]:
    """(name, [B, *shape]) of each trainable parameter: the gradients of each row's mean response-token loss.

    One parameter at a time, so that few are in memory; `.grad` stays as it was.  Raises TrainingError for a trainable
    parameter outside of linear layers.
    """
    layers = _layers(ctx)
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((module, inputs[0], output))

    handles = [module.register_forward_hook(keep) for module in layers]
    try:
        losses = ctx.per_sample_loss(batch, grad=True)
    finally:
        for handle in handles:
            handle.remove()
    # No row's loss depends on another row, so that the sum's gradient holds each row's own.
    slopes = torch.autograd.grad(losses.sum(), [output for *_, output in calls], allow_unused=True)
    found: dict[str, Tensor] = {}
    seen: dict[nn.Module, int] = {module: sum(module is called for called, *_ in calls) for module in layers}
    for (module, inputs, _), slope in zip(calls, slopes, strict=True):
        seen[module] -= 1
        for kind, name in layers[module].items():
            part = _gradient(module, kind, inputs, slope, batch)
            found[name] = found[name] + part if name in found else part
        if not seen[module]:
            yield from ((name, found.pop(name)) for name in layers[module].values())


def _layers(ctx: StepContext) -> dict[nn.Module, dict[str, str]]:
    """The linear layers that learn: the names of their trainable weight and bias."""
    found: dict[nn.Module, dict[str, str]] = {}
    left = {id(p): name for name, p in ctx.parameters().items()}
    for module in ctx.model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            own = {kind: left.pop(id(p)) for kind, p in module.named_parameters(recurse=False) if id(p) in left}
            found |= {module: own} if own else {}
    if left:
        raise TrainingError(f"gradients of single rows are formed for linear layers only, and '{min(left.values())}' "
                            "learns too; choose parameters: lora with linear targets")  # fmt: skip
    return found


def _gradient(module: nn.Module, kind: str, inputs: Tensor, slope: Tensor | None, batch: Batch) -> Tensor:
    """[B, *shape] of one call's weight or bias, in at least fp32; OPT's MLP flattens rows and tokens."""
    rows, tokens = batch.input_ids.shape
    parameter: Tensor = getattr(module, kind)
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if slope is None:
        return torch.zeros(rows, *parameter.shape, dtype=dtype, device=parameter.device)
    if slope.shape[:-1] not in ((rows, tokens), (rows * tokens,)):
        raise TrainingError(f"a linear layer got {tuple(inputs.shape)}, expected [rows, tokens, size]: the gradients "
                            "of single rows cannot be told apart; choose other targets")  # fmt: skip
    slope_BTO = slope.reshape(rows, tokens, -1).to(dtype)
    if kind == "bias":
        return slope_BTO.sum(1)
    inputs_BTI = inputs.detach().reshape(rows, tokens, -1).to(dtype)
    pair = (inputs_BTI, slope_BTO) if isinstance(module, Conv1D) else (slope_BTO, inputs_BTI)
    return torch.einsum("bti,btj->bij", *pair)


def projected(blocks: Iterable[Named], size: int, seed: int) -> Tensor:
    """[B, size]: the blocks side by side, times a matrix of random signs over sqrt(size); with size 0 as they are.

    The signs follow from the seed and the parameters' names, and are made anew for each batch, `SIGNS` rows at a time:
    the matrix as a whole would not fit in memory.  A GPU draws other signs than a CPU.
    """
    if size == 0:
        return torch.cat([block.flatten(1) for _, block in blocks], 1)
    steps = torch.zeros(())
    for name, block in blocks:
        generator = torch.Generator(block.device).manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        for part in block.flatten(1).split(SIGNS, 1):
            steps = part @ _signs(part.shape[1], size, generator).to(part) + steps.to(part)
    return steps / size**0.5


def _signs(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random signs, eight from a byte: several times quicker than one draw for each."""
    device, shape = generator.device, (rows, -(-columns // 64))
    words = torch.randint(-(2**63), 2**63 - 1, shape, generator=generator, device=device)
    return functional.embedding(words.view(torch.uint8).int(), _BITS.to(device)).reshape(rows, -1)[:, :columns]
