"""Full: every row stays, the arm that a selector is compared with (methods.md 7).

Cost: none.

Its scores are all equal, so that a share below 1 would be drawn at random; it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apothecary.errors import ConfigError
from apothecary.registry import register
from apothecary.train.method import Selector

if TYPE_CHECKING:
    from apothecary.data.rows import Row
    from apothecary.train.workbench import Workbench


@register("curate", "full")
@dataclass(frozen=True)
class Full(Selector):
    """All rows; it has no hyper-parameter."""

    def check(self, keep: float) -> None:
        if keep != 1:
            raise ConfigError(f"curate method 'full' got keep {keep}, expected 1, as it ranks no rows; "
                              "set keep: 1, or choose a selector such as random")  # fmt: skip

    def score(self, bench: Workbench, rows: Sequence[Row]) -> dict[str, float]:
        return {row.id: 0.0 for row in rows}
