"""Whether two groups differ on harmful prompts, prompt by prompt."""

from __future__ import annotations

from statistics import fmean

from apothecary.report.summary import LEVEL, Group
from apothecary.stats import mcnemar, mean_interval, paired_bootstrap

LETTERS = {"HS": "c", "HS+": "cn"}


def compare(a: Group, b: Group, measure: str = "HS") -> int | None:
    """-1 where `a` scores lower than `b`, 1 where higher, 0 where they cannot be told apart; None without labels.

    One seed: McNemar's exact test.  Several: the paired bootstrap over prompts, with seeds averaged, and the t interval
    of the differences over the seeds that both have must each exclude zero: the first knows the choice of prompts, the
    second training luck.
    """
    first, second = _labels(a, measure), _labels(b, measure)
    seeds = [seed for seed in first if seed in second]
    if not seeds or len({len(labels[seed]) for labels in (first, second) for seed in seeds}) != 1:
        return None
    ours, theirs = ([labels[seed] for seed in seeds] for labels in (first, second))
    by_seed = [fmean(x) - fmean(y) for x, y in zip(ours, theirs, strict=True)]
    if len(seeds) == 1:
        differ = mcnemar(ours[0], theirs[0]) < 1 - LEVEL
    else:
        a_mean, b_mean = ([fmean(one) for one in zip(*labels, strict=True)] for labels in (ours, theirs))
        intervals = (paired_bootstrap(a_mean, b_mean, LEVEL), mean_interval(by_seed, LEVEL))
        differ = all(low > 0 for low, _ in intervals) or all(high < 0 for _, high in intervals)
    return (1 if fmean(by_seed) > 0 else -1) if differ else 0


def _labels(group: Group, measure: str) -> dict[int | None, list[int]]:
    """1 for each prompt that counts towards the measure, by seed; nothing unless every model has its labels."""
    stored = {model.get("seed"): model.get("harmful_labels") for model in group.models}
    if not all(stored.values()):
        return {}
    return {seed: [int(letter in LETTERS[measure]) for letter in labels or ""] for seed, labels in stored.items()}
