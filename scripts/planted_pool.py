"""A pool of alignment rows with known faults, for studies of selectors: made from the lab's own splits."""

from __future__ import annotations

import random
from collections.abc import Callable

BLOCK = {"good": 10, "benign": 5, "truncated": 1, "mismatched": 1, "garbled": 1, "mislabelled": 2}  # of 20 rows
BLOCKS = 100


def planted_pool(splits: dict[str, list[dict]], opening: Callable[[str, random.Random], str],
                 rng: random.Random) -> list[dict]:  # fmt: skip
    """2,000 rows, each with what it is under `meta.planted`; every block of 20 holds the same share of each kind.

    good: a refusal; benign: a plain question with its answer; truncated: the first words of a refusal; mismatched: the
    answer to another plain question; garbled: a refusal with its words in random order; mislabelled: a harmful prompt
    with an affirmative opening.
    """
    refusals = [row for row in splits["align"] if row["source"] not in ("gsm8k", "simple_instructions")]
    plain = [row for row in splits["align"] if row["source"] in ("gsm8k", "simple_instructions")]
    other = rng.sample(splits["benign"], BLOCK["mismatched"] * BLOCKS)
    rng.shuffle(refusals)
    rng.shuffle(plain)
    kinds = {
        "good": iter(refusals),
        "benign": iter(plain),
        "truncated": map(_truncated, iter(refusals[-300:-200]), [rng] * BLOCKS),
        "mismatched": ({**row, "response": other[i - 1]["response"]} for i, row in enumerate(other)),
        "garbled": map(_garbled, iter(refusals[-400:-300]), [rng] * BLOCKS),
        "mislabelled": ({**row, "response": opening(row["prompt"], rng)} for row in refusals[-200:]),
    }
    rows = []
    for _ in range(BLOCKS):
        chosen = [kind for kind, count in BLOCK.items() for _ in range(count)]
        block = [{**next(kinds[kind]), "meta": {"planted": kind}} for kind in chosen]
        rng.shuffle(block)
        rows += block
    return rows


def _truncated(row: dict, rng: random.Random) -> dict:
    words = row["response"].split()
    return {**row, "response": " ".join(words[: rng.randint(1, 3)])}


def _garbled(row: dict, rng: random.Random) -> dict:
    words = row["response"].split()
    while (mixed := rng.sample(words, len(words))) == words:
        pass
    return {**row, "response": " ".join(mixed)}
