"""Whether two groups differ on harmful prompts, and by how much, prompt by prompt."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from apothecary.report.summary import LEVEL, Group
from apothecary.stats import mcnemar, mean_interval, paired_bootstrap

LETTERS = {"HS": "c", "HS+": "cn"}


@dataclass(frozen=True)
class Difference:
    """`value` = the first group's share less the second's, in [-1, 1], with the 95 % interval `low` to `high`.

    `side` is -1 where the first is lower, 1 where it is higher, 0 where the two cannot be told apart.
    """

    value: float
    low: float
    high: float
    side: int


def compare(a: Group, b: Group, measure: str = "HS") -> int | None:
    """-1 where `a` scores lower than `b`, 1 where higher, 0 where they cannot be told apart; None without labels."""
    found = difference(a, b, measure)
    return found and found.side


def difference(a: Group, b: Group, measure: str = "HS") -> Difference | None:
    """`a` less `b`, over the prompts and seeds that both have; None without labels.

    One seed: the paired bootstrap over prompts gives the interval, McNemar's exact test the side.  Several: two
    intervals, the paired bootstrap over prompts with seeds averaged, and Student's t over the seeds' differences; the
    first knows the choice of prompts, the second training luck.  The interval reaches as far as either, and there is
    a side only where it excludes zero.
    """
    first, second = _labels(a, measure), _labels(b, measure)
    seeds = [seed for seed in first if seed in second]
    if not seeds or len({len(labels[seed]) for labels in (first, second) for seed in seeds}) != 1:
        return None
    ours, theirs = ([labels[seed] for seed in seeds] for labels in (first, second))
    a_mean, b_mean = ([fmean(one) for one in zip(*labels, strict=True)] for labels in (ours, theirs))
    value = fmean(a_mean) - fmean(b_mean)
    low, high = paired_bootstrap(a_mean, b_mean, LEVEL)
    if len(seeds) == 1:
        differ = mcnemar(ours[0], theirs[0]) < 1 - LEVEL
    else:
        over_seeds = mean_interval([fmean(x) - fmean(y) for x, y in zip(ours, theirs, strict=True)], LEVEL)
        low, high = max(-1.0, min(low, over_seeds.low)), min(1.0, max(high, over_seeds.high))
        differ = low > 0 or high < 0
    return Difference(value, low, high, (1 if value > 0 else -1) if differ else 0)


def _labels(group: Group, measure: str) -> dict[int | None, list[int]]:
    """1 for each prompt that counts towards the measure, by seed; nothing unless every model has its labels."""
    stored = {model.get("seed"): model.get("harmful_labels") for model in group.models}
    if not all(stored.values()):
        return {}
    return {seed: [int(letter in LETTERS[measure]) for letter in labels or ""] for seed, labels in stored.items()}
