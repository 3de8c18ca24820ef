"""From scores to a subset: one rule for every selector."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from apothecary.data.rows import Row
from apothecary.errors import ConfigError, DataError


def keep(scores: Mapping[str, float], rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """The `round(share * N)` rows of highest score, in their original order; ties are broken by the seed.

    Raises ConfigError for a share outside (0, 1], DataError when a row has no score or the score is not a number.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"curate.keep is {share}, expected a share in (0, 1]")
    for row in rows:
        score = scores.get(row.id)
        if score is None or score != score:
            raise DataError(f"row '{row.id}' has {'no score' if score is None else 'score NaN'}; "
                            "every row of the pool must be scored with a number")  # fmt: skip
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    order.sort(key=lambda i: scores[rows[i].id], reverse=True)
    chosen = set(order[: max(1, round(share * len(rows)))])
    return [row for i, row in enumerate(rows) if i in chosen]
