"""How well an order tells two kinds of rows apart, and how far two orders agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

from apothecary.stats.shares import Interval, check_level


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The area under the ROC curve: how often a positive outranks a negative, ties counting one half.

    Infinite scores have their place in the order.  Raises ValueError where either side is empty or a score is NaN.
    """
    from scipy.stats import rankdata

    if not positive or not negative:
        raise ValueError(f"got {len(positive)} positives and {len(negative)} negatives, expected some of both")
    ranks = rankdata([*positive, *negative], nan_policy="raise")
    n = len(positive)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * len(negative)))


def auc_interval(value: float, positives: int, negatives: int, level: float = 0.95) -> Interval:
    """Interval for an AUC that so many rows of either kind gave, within [0, 1].

    The standard error of Hanley and McNeil 1982, taken at the limit and not at the estimate, as Wilson does for shares
    and Newcombe 2006 for this: the limits are those A at which

        |value - A| = z sqrt((A (1 - A) + (p - 1) (A / (2 - A) - A^2) + (n - 1) (2 A^2 / (1 + A) - A^2)) / (p n))

    so that a perfect order has an interval, too.  Raises ValueError for a value outside [0, 1] or a kind without rows.
    """
    check_level(level)
    if not 0 <= value <= 1 or min(positives, negatives) < 1:
        raise ValueError(f"got an AUC of {value} from {positives} and {negatives} rows, expected one in [0, 1] from "
                         "some of both")  # fmt: skip
    low = _auc_limit(value, positives, negatives, level)
    return Interval(low, 1 - _auc_limit(1 - value, negatives, positives, level))


def _auc_limit(value: float, positives: int, negatives: int, level: float) -> float:
    """The lower limit; the upper one is the lower one of the complement, with the kinds exchanged."""
    from scipy.optimize import brentq

    z = NormalDist().inv_cdf((1 + level) / 2)

    def excess(a: float) -> float:
        above, below = a / (2 - a) - a * a, 2 * a * a / (1 + a) - a * a
        variance = (a * (1 - a) + (positives - 1) * above + (negatives - 1) * below) / (positives * negatives)
        return value - a - z * math.sqrt(max(0.0, variance))

    edge: Any = min(value, 1 - 1e-12)  # at 1 the error vanishes
    found: Any = 0.0 if value <= 0 else brentq(excess, 0.0, edge, xtol=1e-14)
    return float(found)


def auc_difference(
    a: tuple[Sequence[float], Sequence[float]], b: tuple[Sequence[float], Sequence[float]]
) -> tuple[float, float]:
    """AUC of `a` less that of `b`, with its standard error: (positives, negatives) scored twice, rows in one order.

    DeLong, DeLong and Clarke-Pearson 1988.  With V_i the share of negatives that positive i outranks, W_j the share of
    positives that outrank negative j, and differences taken row by row: error^2 = var(dV) / p + var(dW) / n.
    Raises ValueError where the rows differ in number, or are fewer than two of a kind.
    """
    import numpy as np

    sizes = [len(kind) for kind in a]
    if sizes != [len(kind) for kind in b] or min(sizes) < 2:
        raise ValueError("got rows that differ in number or are fewer than two of a kind, expected the same rows twice")
    placed = [_placements(*scores) for scores in (a, b)]
    outranks, outranked = (np.subtract(placed[0][i], placed[1][i]) for i in (0, 1))
    variance = outranks.var(ddof=1) / sizes[0] + outranked.var(ddof=1) / sizes[1]
    return float(outranks.mean()), math.sqrt(variance)


def _placements(positive: Sequence[float], negative: Sequence[float]) -> tuple[Any, Any]:
    """For each positive the share of negatives below it, for each negative that of positives above it; ties half."""
    from scipy.stats import rankdata

    size, joint = len(positive), rankdata([*positive, *negative], nan_policy="raise")
    own = rankdata(positive), rankdata(negative)
    return (joint[:size] - own[0]) / len(negative), 1 - (joint[size:] - own[1]) / size


def rank_correlation(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Spearman's correlation of two rankings of the same rows, by id; NaN where one of them tells no rows apart.

    Infinite scores have their place in the order.  Raises ValueError where the ids differ or a score is NaN.
    """
    import numpy as np
    from scipy.stats import rankdata

    if a.keys() != b.keys() or len(a) < 2:
        raise ValueError(f"got rankings of {len(a)} and {len(b)} rows, expected the same rows, two or more")
    ranks = [rankdata([scores[name] for name in a], nan_policy="raise") for scores in (a, b)]
    if any(np.ptp(each) == 0 for each in ranks):
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])
