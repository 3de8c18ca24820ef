"""Mixing harmful rows into harmless ones, and taking near duplicates out."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from apothecary.data.formats import unique_ids
from apothecary.data.near import near_pairs
from apothecary.data.rows import Row
from apothecary.errors import ConfigError, DataError


def mix(benign: Sequence[Row], harmful: Sequence[Row], p: float, n: int, seed: int) -> list[Row]:
    """`n` rows, exactly round(p * n) of them harmful, drawn without replacement and shuffled.

    For one seed the harmful rows at a smaller p are among those at a larger p, and the benign rows at a larger p among
    those at a smaller one, so that a curve over p is paired.  Halves round to the even number, as `round` does.
    Raises ConfigError for p outside [0, 1] or n below 1, DataError when there are too few rows.
    """
    if not 0 <= p <= 1 or math.isnan(p):
        raise ConfigError(f"p is {p}, expected a share of harmful rows in [0, 1]; 10 % is 0.1")
    if n < 1:
        raise ConfigError(f"n is {n}, expected a number of rows of at least 1")
    count = round(p * n)
    for kind, asked, rows in (("harmful", count, harmful), ("benign", n - count, benign)):
        if asked > len(rows):
            raise DataError(f"{asked} {kind} rows asked for (p = {p}, n = {n}), there are {len(rows)}; change p or n")
    ids = unique_ids([*harmful, *benign])
    drawn = _draw(ids[: len(harmful)], count, f"{seed}/harmful")
    drawn += _draw(ids[len(harmful) :], n - count, f"{seed}/benign")
    random.Random(f"{seed}/order").shuffle(drawn)
    return drawn


def _draw(rows: Sequence[Row], count: int, seed: str) -> list[Row]:
    """The first `count` of a seeded order, which does not depend on `count`."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    return order[:count]


def composition(rows: Iterable[Row]) -> dict[str, Any]:
    """What a manifest says of rows: their number, and counts by role, by source and by source within each role."""
    count = Counter((row.role, row.source) for row in rows)
    roles: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    within: dict[str, dict[str, int]] = {}
    for (role, source), number in sorted(count.items()):
        roles[role] += number
        sources[source] += number
        within.setdefault(role, {})[source] = number
    return {"rows": count.total(), "roles": dict(roles), "sources": dict(sorted(sources.items())),
            "sources_by_role": within}  # fmt: skip


def deduplicate(rows: Sequence[Row], against: Sequence[Row] = ()) -> tuple[list[Row], list[Row]]:
    """(kept, dropped): a row is dropped when its last user message equals or nearly equals that of an earlier kept row
    or of any row in `against` (`near.py`: lower-case words, Jaccard similarity >= 0.7).
    """
    first = len(against)
    near: dict[int, list[int]] = {}
    for i, j in near_pairs([row.text for row in (*against, *rows)]):
        near.setdefault(j, []).append(i)
    gone: set[int] = set()
    for j in range(first, first + len(rows)):
        if any(i not in gone for i in near.get(j, ())):
            gone.add(j)
    kept = [row for j, row in enumerate(rows, first) if j not in gone]
    return kept, [row for j, row in enumerate(rows, first) if j in gone]
