"""From scores to a subset: one rule for every selector."""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping, Sequence

from apothecary.data.rows import Chosen, Row
from apothecary.errors import ConfigError, DataError


def keep(scores: Mapping[str, float], rows: Sequence[Row], share: float, seed: int) -> Chosen:
    """The `round(share * N)` rows of highest score, in their original order; ties are broken by the seed.

    Rows are read one at a time, and none is held.  Raises ConfigError for a share outside (0, 1], DataError when a row
    has no score or the score is not a number.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"curate.keep is {share}, expected a share in (0, 1]")
    values = array("d", (_score(scores, row) for row in rows))
    order = random.Random(seed).sample(range(len(values)), len(values))
    order.sort(key=values.__getitem__, reverse=True)
    return Chosen(rows, sorted(order[: max(1, round(share * len(values)))]))


def _score(scores: Mapping[str, float], row: Row) -> float:
    score = scores.get(row.id)
    if score is None or score != score:
        raise DataError(f"row '{row.id}' has {'no score' if score is None else 'score NaN'}; "
                        "every row of the pool must be scored with a number")  # fmt: skip
    return score
