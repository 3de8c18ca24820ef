"""Auxiliary rows (harmful, benign, paired, validation) beside the training rows: seeded, resumable, shared out."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import cast

from apothecary.data.batching import plan, share
from apothecary.data.chat import Rendered
from apothecary.errors import ConfigError, did_you_mean
from apothecary.train.batch import Batch, collate, weigh


class Auxiliary:
    """Batches by role.  One *global* batch is drawn for an optimiser step and divided among its micro-batches and
    processes, so that a weight means the same at any accumulation; its normaliser counts the whole global batch.
    """

    def __init__(self, rows: Mapping[str, Sequence[Rendered]], batch_size: int, pad_id: int, reduction: str,
                 seed: int, processes: int = 1, rank: int = 0) -> None:  # fmt: skip
        self.rows, self.batch_size, self.pad_id, self.reduction = rows, batch_size, pad_id, reduction
        self.seed, self.processes, self.rank = seed, processes, rank
        self.drawn: dict[str, int] = {}  # global batches drawn so far, by role: the resumable state
        self._step: dict[str, list[list[Rendered]]] = {}  # those of the current optimiser step
        self._calls: dict[str, int] = {}  # draws of the current micro-step
        self._plans: dict[tuple[str, int], list[list[int]]] = {}

    def begin_step(self) -> None:
        self._step.clear()

    def begin_micro_step(self) -> None:
        self._calls.clear()

    def batch(self, role: str, micro: int, window: int, per: str) -> Batch:
        """This process's part of the next global batch: of one micro-step (`per="micro"`) or of the step."""
        return self._collate(*self._draw(role, micro, window, per))

    def pair(self, micro: int, window: int, per: str) -> tuple[Batch, Batch]:
        """`batch` of role `pairs` with the responses, and with the rejected answers of the same rows."""
        rows, mine = self._draw("pairs", micro, window, per)
        other = [[cast(Rendered, row.rejected) for row in part] for part in (rows, mine)]
        return self._collate(rows, mine), self._collate(*other)

    def _collate(self, rows: Sequence[Rendered], mine: Sequence[Rendered]) -> Batch:
        return collate(mine, self.pad_id, weigh(rows, self.reduction), blank=rows[0])

    def _draw(self, role: str, micro: int, window: int, per: str) -> tuple[list[Rendered], list[Rendered]]:
        """The rows of the next global batch, and this process's part of them."""
        if role not in self.rows:
            raise ConfigError(f"the method asked for rows of role '{role}'; {did_you_mean(role, self.rows)}")
        call = self._calls.get(role, 0)
        self._calls[role] = call + 1
        held = self._step.setdefault(role, [])
        while len(held) <= call:
            held.append(self._next(role))
        rows = held[call]
        parts, index = self.processes, self.rank
        if per == "micro":
            parts, index = window * self.processes, micro * self.processes + self.rank
        return rows, [rows[i] for i in share(list(range(len(rows))), parts, index)]

    def _next(self, role: str) -> list[Rendered]:
        number = self.drawn.get(role, 0)
        self.drawn[role] = number + 1
        rows = self.rows[role]
        per_epoch = max(1, -(-len(rows) // self.batch_size))
        epoch = number // per_epoch
        if (role, epoch) not in self._plans:
            self._plans = {key: value for key, value in self._plans.items() if key[0] != role}
            seed = zlib.crc32(f"{self.seed}:{role}".encode())
            lengths = [len((row.rejected or row).ids) for row in rows]
            self._plans[role, epoch] = plan(lengths, self.batch_size, seed, epoch)
        return [rows[i] for i in self._plans[role, epoch][number % per_epoch]]
