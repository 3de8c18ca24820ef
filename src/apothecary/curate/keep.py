"""From scores to a subset: one rule for every selector.

A score of -inf says that the selector has left a row out: it is too long, or the method drops it.  Such a row is never
kept.
"""

from __future__ import annotations

import logging
import math
import random
from array import array
from collections.abc import Iterable, Mapping, Sequence

from apothecary.data.rows import Chosen, Row
from apothecary.errors import ConfigError, DataError

log = logging.getLogger(__name__)


def keep(scores: Mapping[str, float], rows: Sequence[Row], share: float, seed: int) -> Chosen:
    """The `round(share * N)` rows of highest score, in their original order; ties are broken by the seed.

    There are fewer, and a warning, where the selector has left so many out.  Rows are read one at a time, and none is
    held.  Raises ConfigError for a share outside (0, 1], DataError when a row has no score, the score is not a number,
    or every row is left out.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"curate.keep is {share}, expected a share in (0, 1]")
    values = array("d", (_score(scores, row) for row in rows))
    order = random.Random(seed).sample(range(len(values)), len(values))
    order.sort(key=values.__getitem__, reverse=True)
    wanted, usable = max(1, round(share * len(values))), len(values) - dropped(values)
    if not usable:
        raise DataError(f"the selector has left out all {len(values)} rows of the pool, expected one or more to keep; "
                        "raise its length limit or relax what it drops")  # fmt: skip
    if usable < wanted:
        log.warning("the selector has left out %d of %d rows, so that %d are kept in place of %d; lower curate.keep, "
                    "raise its length limit or relax what it drops",
                    len(values) - usable, len(values), usable, wanted)  # fmt: skip
    return Chosen(rows, sorted(order[: min(wanted, usable)]))


def dropped(scores: Iterable[float]) -> int:
    """How many rows the selector has left out."""
    return sum(score == -math.inf for score in scores)


def _score(scores: Mapping[str, float], row: Row) -> float:
    score = scores.get(row.id)
    if score is None or score != score:
        raise DataError(f"row '{row.id}' has {'no score' if score is None else 'score NaN'}; "
                        "every row of the pool must be scored with a number")  # fmt: skip
    return score
