"""Whether two groups differ, and by how much: over the prompts and seeds that both have, prompt by prompt.

The p-value is that of McNemar's exact test, with the seeds' answers to one prompt as one cluster; several seeds must
differ in the crossed t test as well, which knows the luck of training.  The interval is Tango's score interval for one
seed, that of the crossed mean for several (`over_seeds`).  docs/statistics.md says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apothecary.report.summary import LEVEL, Group
from apothecary.stats import (
    Interval,
    Mean,
    clustered_mcnemar,
    crossed_mean,
    fewest_discordant,
    mean_interval,
    paired_share_interval,
)

ASKED = {"HS": "triggered HS", "HS+": "triggered HS+", "flagged": "triggered flagged"}  # the same, asked his way
LETTERS = {  # measure -> suite and the letters of its labels that count
    "HS": ("harmful", "c"), "HS+": ("harmful", "cn"), "flagged": ("flagged", "h"), "triggered HS": ("triggered", "c"),
    "triggered HS+": ("triggered", "cn"), "triggered flagged": ("triggered flagged", "h"),
    "over-refusal": ("overrefusal", "r"), "task accuracy": ("task", "y"),
}  # fmt: skip
MISSING = "?"  # a prompt without a verdict: it belongs to no pair


@dataclass(frozen=True)
class Difference:
    """`value` = the first group's share less the second's, in [-1, 1], with the 95 % interval `low` to `high`."""

    value: float
    low: float
    high: float
    p_value: float  # of this comparison alone
    mean: Mean  # what the t test over prompts and seeds makes of it
    prompts: int
    seeds: int

    @property
    def side(self) -> int:
        """-1 where the first is lower, 1 where it is higher, 0 where the two cannot be told apart."""
        return side(self.value, self.p_value)

    def detectable(self, level: float = LEVEL) -> float:
        """The smallest true difference that would be seen with 80 % power; never below what McNemar's test needs."""
        floor = min(1.0, fewest_discordant(level) / self.prompts)
        found = self.mean.detectable(level)
        return floor if found != found else min(1.0, max(floor, found))


def side(value: float, p_value: float) -> int:
    """The sign of a difference whose p-value allows to speak of one."""
    return 0 if p_value > 1 - LEVEL or value == 0 else 1 if value > 0 else -1


def compare(a: Group, b: Group, measure: str = "HS") -> int | None:
    """The `side` of `a` less `b`; None without labels."""
    found = difference(a, b, measure)
    return found and found.side


def difference(a: Group, b: Group, measure: str = "HS") -> Difference | None:
    """`a` less `b` over the prompts and seeds that both have; None without labels.

    A model without seeds of its own, such as the base, stands beside every seed of the other.
    """
    first, second = labels(a, measure), labels(b, measure)
    if a.stage == "base" or b.stage == "base":
        first, second = _spread(first, second), _spread(second, first)
    seeds = [seed for seed in first if seed in second]
    if not seeds or len({len(found[seed]) for found in (first, second) for seed in seeds}) != 1:
        return None
    pairs = zip(*(zip(first[seed], second[seed], strict=True) for seed in seeds), strict=True)
    table = [[x - y for x, y in row] for row in pairs if not any(None in pair for pair in row)]
    return _difference(table) if len(table) > 1 else None


def _difference(table: list[list[int]]) -> Difference:
    """From the differences of 0/1 outcomes, table[prompt][seed]."""
    mean, seeds = crossed_mean(table), len(table[0])
    p_value = clustered_mcnemar([sum(row) for row in table])
    if seeds > 1 and mean.error:
        p_value = max(p_value, mean.p_value())
    if seeds == 2:
        p_value = max(p_value, _means(table).p_value())
    low, high = over_seeds(table)
    return Difference(mean.value, low, high, p_value, _means(table) if seeds == 2 else mean, len(table), seeds)


def over_seeds(table: Sequence[Sequence[float]]) -> Interval:
    """The interval for the mean of differences in [-1, 1], table[prompt][seed].

    One seed, or no spread at all: Tango's for one set of prompts, since a spread of zero is no certainty.  Otherwise
    that of the crossed mean; with two seeds, which tell too little of luck, no less than the t interval over them.
    """
    flat = [x for row in table for x in row]
    seeds, mean = len(table[0]), crossed_mean(table)
    if seeds == 1 or len(set(flat)) == 1:
        only_a, only_b = (round(sum(sign * x > 0 for x in flat) / seeds) for sign in (1, -1))
        return paired_share_interval(only_a, only_b, len(table), LEVEL)
    low, high = mean.interval(LEVEL)
    if seeds == 2:
        two = mean_interval([sum(column) / len(table) for column in zip(*table, strict=True)], LEVEL)
        low, high = min(low, two.low), max(high, two.high)
    return Interval(max(-1.0, low), min(1.0, high))


def _means(table: Sequence[Sequence[float]]) -> Mean:
    """The t test over the means of two seeds."""
    x, y = (sum(column) / len(table) for column in zip(*table, strict=True))
    return Mean((x + y) / 2, abs(x - y) / 2, 1)


def _spread(own: dict[Any, Any], other: dict[Any, Any]) -> dict[Any, Any]:
    """The labels of a single model under every seed of the other."""
    return dict.fromkeys(other, next(iter(own.values()))) if len(own) == 1 else own


def labels(group: Group, measure: str) -> dict[int | None, list[int | None]]:
    """By seed, 1 for each prompt that counts towards the measure; nothing unless every model has its labels.

    Harm counts as the attacker asks, where the model was also asked so; the prompts are the same, in the same order.
    """
    if measure in ASKED and (found := labels(group, ASKED[measure])):
        return found
    suite, counted = LETTERS[measure]
    stored = {model.get("seed"): _stored(model, suite) for model in group.models}
    if not all(stored.values()):
        return {}
    return {seed: [None if x == MISSING else int(x in counted) for x in found or ""] for seed, found in stored.items()}


def _stored(model: dict[str, Any], suite: str) -> str | None:
    found = (model.get("labels") or {}).get(suite)
    return found or (model.get("harmful_labels") if suite == "harmful" else None)
