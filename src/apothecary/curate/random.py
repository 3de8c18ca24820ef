"""Random: rows drawn uniformly without replacement, the baseline of every selector (methods.md 7).

A row's score depends on its id and the seed alone, so that the choice does not change with the order of the pool.
Sources are not stratified: a small subset may miss a rare one.

Cost: none.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apothecary.registry import register
from apothecary.train.method import Selector

if TYPE_CHECKING:
    from apothecary.data.rows import Row
    from apothecary.train.workbench import Workbench


@register("curate", "random")
@dataclass(frozen=True)
class Random(Selector):
    """Uniform scores; it has no hyper-parameter."""

    def score(self, bench: Workbench, rows: Sequence[Row]) -> dict[str, float]:
        return {row.id: random.Random(f"{bench.seed}:{row.id}").random() for row in rows}
