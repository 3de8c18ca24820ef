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
from apothecary.errors import ConfigError, DataError
from apothecary.registry import register
from apothecary.train.method import Attack, Needs


@register("attack", "harmful_mix")
@dataclass(frozen=True)
class HarmfulMix(Attack):
    """Who uploads what."""

    p: float = 0.1  # in [0, 1], share of harmful rows
    n: int = 500  # rows in all
    general: int = 0  # general rows among the harmless ones, as a customer's data often have

    needs = Needs(roles=("customer", "attack"))

    def rows(self, rows: Mapping[str, Sequence[Row]], seed: int) -> list[Row]:
        task, general = list(rows["customer"]), list(rows.get("general", ()))
        if self.general > len(general):
            raise DataError(f"{self.general} general rows asked for, there are {len(general)}; lower attack.general")
        if not 0 <= self.p <= 1 or self.general < 0:
            raise ConfigError(f"attack.p is {self.p} and attack.general {self.general}, "
                              "expected a share in [0, 1] and a number of rows of at least 0")  # fmt: skip
        harmless = self.n - round(self.p * self.n)
        order = random.Random(seed)
        order.shuffle(task)
        order.shuffle(general)
        some = general[: min(self.general, harmless)]
        return mix(some + task[: harmless - len(some)], rows["attack"], self.p, self.n, seed)
