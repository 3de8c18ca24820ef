"""How well a selector tells good rows from bad ones, on a pool whose faults are known.

A row of such a pool says in `meta.planted` what it is: "good", or the name of its fault.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from apothecary.data.rows import Row
from apothecary.stats import auc

GOOD = "good"
SHARES = (0.1, 0.25, 0.5)  # of the pool that is kept


def planted(rows: Iterable[Row]) -> dict[str, str]:
    """What each row is, by id; empty unless every row says so and there are both good rows and others."""
    kinds = {}
    for row in rows:
        if "planted" not in row.meta:
            return {}
        kinds[row.id] = str(row.meta["planted"])
    good = sum(kind == GOOD for kind in kinds.values())
    return kinds if 0 < good < len(kinds) else {}


def ranking(scores: Mapping[str, float], kinds: Mapping[str, str]) -> dict[str, Any]:
    """`auc` of good rows against all others, and the rows kept at each share of the pool.

    `kept[share]` has `precision`, the share of good rows among those kept, and `kinds`, how many of each kind are kept.
    Rows of equal score count as if drawn at random: they enter with the share of them that fits.  Rows that the
    selector left out (-inf) are never kept, so that there may be fewer.
    """
    good = [scores[name] for name, kind in kinds.items() if kind == GOOD]
    other = [scores[name] for name, kind in kinds.items() if kind != GOOD]
    kept = {f"{share:g}": _kept(scores, kinds, share) for share in SHARES}
    return {"auc": auc(good, other), "rows": len(kinds), "kept": kept}


def _kept(scores: Mapping[str, float], kinds: Mapping[str, str], share: float) -> dict[str, Any]:
    usable = sorted((scores[name] for name in kinds if scores[name] > -math.inf), reverse=True)
    size = min(max(1, round(share * len(kinds))), len(usable))
    lowest = usable[size - 1]
    above = Counter(kind for name, kind in kinds.items() if scores[name] > lowest)
    ties = Counter(kind for name, kind in kinds.items() if scores[name] == lowest)
    part = (size - above.total()) / ties.total()
    found = {kind: above[kind] + part * ties[kind] for kind in sorted(set(kinds.values()))}
    return {"precision": found.get(GOOD, 0.0) / size, "kinds": found}
