"""Length-grouped batches as a pure function of (lengths, batch size, seed, epoch).

The epoch's *global* batches do not depend on how many processes or accumulated micro-batches share them, so that the
same rows meet in the same optimiser step on every layout.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from apothecary.errors import ConfigError

BLOCK = 16  # global batches sorted together: more saves padding, fewer mixes better


def plan(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The epoch's global batches of row indices, every row exactly once; the last cut may be smaller.

    Rows are shuffled, cut into blocks of `BLOCK` batches, sorted by length inside each block and cut into batches,
    whose order is shuffled.  Indices inside a batch ascend in length.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size is {batch_size}, expected at least 1 row")
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches = []
    for start in range(0, len(order), BLOCK * batch_size):
        block = sorted(order[start : start + BLOCK * batch_size], key=lengths.__getitem__)
        batches += [block[i : i + batch_size] for i in range(0, len(block), batch_size)]
    rng.shuffle(batches)
    return batches


def share(global_batch: Sequence[int], parts: int, index: int) -> list[int]:
    """Part `index` of `parts` contiguous parts, whose sizes differ by at most one; empty when rows run out."""
    if not 0 <= index < parts:
        raise ConfigError(f"part {index} of {parts} asked for, expected a number in [0, {parts})")
    size, larger = divmod(len(global_batch), parts)
    start = index * size + min(index, larger)
    return list(global_batch[start : start + size + (index < larger)])


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]], parts: int = 1) -> float:
    """Padding tokens / all tokens, in [0, 1), when each batch is split into `parts` padded micro-batches."""
    real = padded = 0
    for batch in batches:
        for index in range(parts):
            part = [lengths[i] for i in share(batch, parts, index)]
            real += sum(part)
            padded += len(part) * max(part, default=0)
    return 1 - real / padded if padded else 0.0
