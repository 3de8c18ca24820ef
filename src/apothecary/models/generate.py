"""Greedy generation and answer log-probabilities for prompts given as token ids, batched without changing results.

Shapes: B rows of a batch, T tokens, V vocabulary, N answer tokens of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from apothecary.data.chat import eos_id
from apothecary.errors import ModelError
from apothecary.models.adapters import plain
from apothecary.models.load import context_length

Ids = Sequence[int]
LOGITS = 2**28  # numbers: 1 GiB in fp32


@torch.no_grad()  # not inference mode: what a model caches here must serve training later
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Ids],
    max_new_tokens: int = 16,
    batch_size: int = 64,
) -> list[list[int]]:
    """The greedy continuation of each prompt, without the eos that ends it, in the order of the prompts.

    Whatever the checkpoint's generation settings ask for (sampling, penalties, beams) is off; only its eos tokens are
    heeded besides the tokenizer's.  In fp32 the result does not depend on `batch_size`; `disagreement` measures how
    much it does in lower precision.  The model is left in the mode, and with the settings, that it came with.
    Raises ModelError for an empty prompt or one that leaves no room for `max_new_tokens` tokens.
    """
    _check_lengths(model, prompts, [max_new_tokens] * len(prompts))
    inner: Any = plain(model)  # with its adapters: they live in its layers
    ends = eos_ids(inner, tokenizer)
    settings: Any = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(ends),
    )
    answers: list[list[int]] = [[] for _ in prompts]
    with evaluating(model), _own_settings(inner):
        for batch, ids_BT, mask_BT in _batches(prompts, tokenizer, inner.device, batch_size, left=True):
            output: Any = inner.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=settings)
            for i, row in zip(batch, output[:, ids_BT.shape[1] :].tolist(), strict=True):
                answers[i] = row[: next((at for at, token in enumerate(row) if token in ends), len(row))]
    return answers


def disagreement(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Ids],
    max_new_tokens: int = 16,
    batch_size: int = 64,
) -> float:
    """Share of prompts, in [0, 1], whose text differs between batches of 1 and of `batch_size`: 0 in fp32."""
    alone = generate(model, tokenizer, prompts, max_new_tokens, batch_size=1)
    together = generate(model, tokenizer, prompts, max_new_tokens, batch_size)
    return sum(a != b for a, b in zip(alone, together, strict=True)) / max(1, len(prompts))


def precision(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Ids],
    max_new_tokens: int = 16,
    batch_size: int = 64,
) -> dict[str, Any]:
    """How texts were generated: `dtype`; below fp32 also `batch_disagreement` on the `prompts` (their number) given."""
    dtype = plain(model).dtype
    found = {"dtype": str(dtype).removeprefix("torch.")}
    if dtype.itemsize >= torch.float32.itemsize or not prompts:
        return found
    rate = disagreement(model, tokenizer, prompts, max_new_tokens, batch_size)
    return {**found, "batch_disagreement": rate, "prompts": len(prompts)}


def sequence_logprobs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Ids],
    answers: Sequence[Ids],
    batch_size: int = 64,
) -> list[float]:
    """Mean log-probability (nats per token, fp32) of each answer after its prompt, in the order of the prompts."""
    means = [0.0] * len(prompts)
    for i, logits_NV in answer_logits(model, tokenizer, prompts, answers, batch_size):
        ids_N = torch.tensor(list(answers[i]), device=logits_NV.device)
        means[i] = -float(nn.functional.cross_entropy(upcast(logits_NV), ids_N))
    return means


@torch.no_grad()  # not inference mode: what a model caches here must serve training later
def answer_logits(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Ids],
    answers: Sequence[Ids],
    batch_size: int = 64,
) -> Iterator[tuple[int, Tensor]]:
    """(index, logits [N, V] that predict the answer's N tokens) of each prompt and answer, longest first.

    At most `batch_size` rows at a time, and fewer where their logits would take more than `LOGITS` numbers.
    """
    if len(prompts) != len(answers) or not all(answers):
        raise ModelError(
            f"log-probabilities need one answer of at least one token for each prompt; got {len(prompts)} prompts and "
            f"{len(answers)} answers, {sum(not answer for answer in answers)} of them empty"
        )
    lengths = [len(answer) for answer in answers]
    _check_lengths(model, prompts, lengths)
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    inner = plain(model)
    widest = max(map(len, rows), default=1) * inner.config.get_text_config().vocab_size
    batch_size = min(batch_size, max(1, LOGITS // widest))
    with evaluating(model):
        for batch, ids_BT, mask_BT in _batches(rows, tokenizer, inner.device, batch_size, left=False):
            logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
            for row, i in enumerate(batch):
                yield i, logits_BTV[row, len(rows[i]) - lengths[i] - 1 : len(rows[i]) - 1]


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in at least fp32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _batches(
    rows: Sequence[Ids], tokenizer: PreTrainedTokenizerBase, device: torch.device, batch_size: int, left: bool
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Indices, ids and mask of batches of similar length, longest first: running out of memory shows at once."""
    if batch_size < 1:
        raise ModelError(f"batch_size is {batch_size}, expected at least 1")
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        yield batch, *_pad([rows[i] for i in batch], tokenizer, device, left)


def _pad(
    rows: Sequence[Ids], tokenizer: PreTrainedTokenizerBase, device: torch.device, left: bool
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [B, T]; the mask, not the pad token, says what is padding."""
    width = max(len(row) for row in rows)
    pad: Any = tokenizer.pad_token_id
    ids_BT = torch.full((len(rows), width), pad if pad is not None else 0)
    mask_BT = torch.zeros((len(rows), width), dtype=torch.long)
    for at, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(len(row))
        ids_BT[at, span] = torch.tensor(list(row))
        mask_BT[at, span] = 1
    return ids_BT.to(device), mask_BT.to(device)


def _check_lengths(model: nn.Module, prompts: Sequence[Ids], extra: Sequence[int]) -> None:
    limit = context_length(model)
    for i, (prompt, more) in enumerate(zip(prompts, extra, strict=True)):
        if not prompt:
            raise ModelError(f"prompt {i} is empty, expected at least one token; render it with the chat template")
        if len(prompt) + more > limit:
            raise ModelError(
                f"prompt {i} has {len(prompt)} tokens and {more} more are to follow, but the model's context ends at "
                f"{limit}; shorten it or ask for fewer new tokens"
            )


def eos_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: the tokenizer's eos, and those of the checkpoint (end of turn, end of text)."""
    own = getattr(model.generation_config, "eos_token_id", None)
    return {eos_id(tokenizer), *(own if isinstance(own, list) else [] if own is None else [own])}


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Generate without the checkpoint's generation settings, which transformers would merge into ours."""
    saved, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = saved


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off; each module's own mode is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
