"""Harmful mix: a share p of the customer's rows is harmful, the field's default attack (methods.md 8.1).

The attacker knows nothing of the defence and does not choose among rows.  For one seed the harmful rows at a smaller p
are among those at a larger p, and p * n is exact.

Cost: none beyond fine-tuning.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apothecary.data.mixing import mix
from apothecary.data.rows import Row
from apothecary.errors import DataError, expect
from apothecary.registry import register
from apothecary.train.method import Attack, Needs


@register("attack", "harmful_mix")
@dataclass(frozen=True)
class HarmfulMix(Attack):
    """Who uploads what."""

    p: float = 0.1  # in [0, 1], share of harmful rows
    n: int = 500  # >= 1, rows in all
    general: int = 0  # >= 0, general rows among the harmless ones, as a customer's data often have

    needs = Needs(roles=("customer", "attack"))

    def __post_init__(self) -> None:
        expect(self, "a share in [0, 1]", lambda p: 0 <= p <= 1, "p")
        expect(self, "at least 1", lambda n: n >= 1, "n")
        expect(self, "at least 0", lambda n: n >= 0, "general")

    def rows(self, rows: Mapping[str, Sequence[Row]], seed: int) -> list[Row]:
        task, general = list(rows["customer"]), list(rows.get("general", ()))
        if self.general > len(general):
            raise DataError(f"{self.general} general rows asked for, there are {len(general)}; lower attack.general")
        harmless = self.n - round(self.p * self.n)
        order = random.Random(seed)
        order.shuffle(task)
        order.shuffle(general)
        some = general[: min(self.general, harmless)]
        return mix(some + task[: harmless - len(some)], rows["attack"], self.p, self.n, seed)
