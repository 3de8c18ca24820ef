"""Rows rendered when they are asked for, so that neither a pool nor its token ids need fit in memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, overload

from apothecary.data.chat import Rendered
from apothecary.data.rows import Row
from apothecary.errors import DataError
from apothecary.train.batch import Batch, collate, weigh
from apothecary.train.config import TrainConfig
from apothecary.train.progress import watched

if TYPE_CHECKING:
    from apothecary.train.context import StepContext
    from apothecary.train.workbench import Workbench


class OnDemand(Sequence[Rendered]):
    """The rows that can be trained on, by position; two numbers a row are kept.

    `position[i]` is the place of the i-th of them in `rows`, `lengths[i]` its tokens.  One pass over the rows finds
    both; rows over the length limit are refused or left out, as the configuration says.
    """

    def __init__(self, bench: Workbench, rows: Sequence[Row], config: TrainConfig) -> None:
        self.bench, self.rows, self.config = bench, rows, config
        self.position, self.lengths = array("q"), array("q")
        for i in watched(bench, range(len(rows)), len(rows), "tokens"):
            for rendered in bench.render_each([rows[i]], config):
                self.position.append(i)
                self.lengths.append(len(rendered.ids))
        if not self.position:
            raise DataError("no rows to train on; expected at least one with a response that is not too long")

    def __len__(self) -> int:
        return len(self.position)

    @overload
    def __getitem__(self, i: int) -> Rendered: ...
    @overload
    def __getitem__(self, i: slice) -> list[Rendered]: ...
    def __getitem__(self, i: int | slice) -> Rendered | list[Rendered]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self.bench.render([self.rows[self.position[i]]], self.config)[0]

    def batch(self, chosen: Sequence[int], ctx: StepContext) -> Batch:
        """Some rows as a batch of their own, normalised as the context's configuration says."""
        rows = [self[i] for i in chosen]
        return collate(rows, self.bench.pad_id, weigh(rows, ctx.config.reduction)).to(ctx.device)

    def ids(self) -> list[str]:
        return [self.rows[i].id for i in self.position]

    def scores(self, values: Iterable[float]) -> dict[str, float]:
        """A number for each row by id; -inf for those that were left out."""
        found = dict.fromkeys((row.id for row in self.rows), float("-inf"))
        return found | {name: float(value) for name, value in zip(self.ids(), values, strict=True)}


def lengths_of(rendered: Sequence[Rendered]) -> Sequence[int]:
    """Tokens of each row, without rendering rows anew."""
    return rendered.lengths if isinstance(rendered, OnDemand) else [len(row.ids) for row in rendered]
