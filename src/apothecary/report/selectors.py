"""What selection of rows was worth: how it ranked a pool whose faults are known, and the time that it took and saved.

Read from stored results (`pipeline.combined.compact`), whose aligned models tell how they were made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, fmean
from typing import Any

from apothecary.report.summary import LEVEL
from apothecary.report.text import NOTHING
from apothecary.stats import Interval, auc_interval, mean_interval, share_interval

Cells = list[list[str]]


@dataclass(frozen=True)
class Made:
    """How the aligned models of one arm came about; one entry of `by_seed` for each seed."""

    arm: str
    align: Mapping[str, Any]  # the recipe's section
    curate: Mapping[str, Any] | None
    by_seed: Mapping[int, Mapping[str, Any]]  # align, curate -> cpu_seconds; curate -> rows, pool, ranking

    def seconds(self, *parts: str) -> dict[int, float]:
        return {seed: sum(made[part]["cpu_seconds"] for part in parts if part in made)
                for seed, made in self.by_seed.items()}  # fmt: skip

    @property
    def epochs(self) -> float:
        return float(self.align["train"]["epochs"])


def made(results: Mapping[str, Any]) -> dict[str, Made]:
    """By arm; "aligned" is the model that the recipe's own sections align."""
    recipe = results["recipe"]
    sections = {"aligned": recipe, **{arm["name"]: arm for arm in recipe["arms"]}}
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for model in results["models"]:
        if model["stage"] == "aligned" and model.get("made"):
            found.setdefault(model["arm"], {})[model["seed"]] = model["made"]
    return {arm: Made(arm, sections[arm]["align"], sections[arm].get("curate"), by_seed)
            for arm, by_seed in found.items()}  # fmt: skip


@dataclass(frozen=True)
class Ranked:
    """How one selector ordered rows whose faults are known; what was found is by seed."""

    arm: str
    curate: Mapping[str, Any]
    found: Mapping[int, Mapping[str, Any]]  # auc, rows, kept
    good: float = 0.5  # share of good rows in the pool
    pools: int = 1  # the seeds ranked one pool, or as many as there are seeds, without a row in common
    against: Mapping[int, Mapping[str, Sequence[float]]] = field(default_factory=dict)  # AUC less a reference's, error

    @property
    def name(self) -> str:
        return self.arm.rpartition(", sft")[0] or self.arm

    @property
    def aucs(self) -> list[float]:
        return [one["auc"] for one in self.found.values()]

    @property
    def auc(self) -> str:
        """The mean over seeds; the wider of Student's t over them and the interval over the rows, on either side.

        Seeds that rank the same rows know nothing of other rows, and a selector that draws no lots gives them one
        number.
        """
        rows = self.pools * next(iter(self.found.values()))["rows"]
        good = round(self.good * rows)
        mean = fmean(self.aucs)
        return _shown(mean, _wider(mean, auc_interval(mean, good, rows - good, LEVEL), self.aucs, (0, 1)))

    @property
    def shares(self) -> list[str]:
        return list(next(iter(self.found.values()))["kept"])

    def precision(self, share: str) -> str:
        """Percent of good rows among those kept, with the interval of any share (`stats.share_interval`)."""
        kept = [one["kept"][share] for one in self.found.values()]
        rows = self.pools * round(sum(kept[0]["kinds"].values()))
        found = [one["precision"] for one in kept]
        return _shown(fmean(found), share_interval(found, rows, LEVEL), 100, 0)

    def less(self, reference: str) -> str:
        """The mean over pools of AUC less the reference's on the same rows; intervals as for the AUC, paired."""
        pairs = [one[reference] for one in self.against.values() if reference in one]
        if not pairs:
            return ""
        differences = [value for value, _ in pairs]
        mean, error = fmean(differences), math.hypot(*(error for _, error in pairs)) / len(pairs)
        half = NormalDist().inv_cdf((1 + LEVEL) / 2) * error
        found = _wider(mean, Interval(mean - half, mean + half), differences, (-1, 1))
        return _shown(mean, found, digits=4, sign="+").replace("-", "\u2212")


def ranked(results: Mapping[str, Any]) -> list[Ranked]:
    """The selectors of a study by falling AUC, each selection once, under the first arm that uses it.

    Raises ValueError where no faults are known.
    """
    found = _ranked_pools(results) if results.get("disjoint_pools") else _ranked_by_arms(results)
    if not found:
        raise ValueError("no selector of these results ranked a pool whose faults are known")
    return sorted(found, key=lambda one: -fmean(one.aucs))


def _ranked_by_arms(results: Mapping[str, Any]) -> list[Ranked]:
    lines: dict[str, Ranked] = {}
    for one in made(results).values():
        found = {seed: entry["curate"]["ranking"] for seed, entry in one.by_seed.items()
                 if "ranking" in entry.get("curate", {})}  # fmt: skip
        if found and one.curate:
            lines.setdefault(repr(one.curate), Ranked(one.arm, one.curate, found))
    return list(lines.values())


def _ranked_pools(results: Mapping[str, Any]) -> list[Ranked]:
    """Of scripts/rank_pools.py, whose stages are selections alone."""
    sections = {arm["name"]: arm["curate"] for arm in results["recipe"]["arms"]}
    by_arm: dict[str, dict[int, Mapping[str, Any]]] = {}
    for stage in results["stages"]:
        by_arm.setdefault(stage["arm"], {})[stage["seed"]] = stage
    lines = []
    planted = next(iter(results["disjoint_pools"].values()))
    for arm, stages in by_arm.items():
        found = {seed: stage["metrics"]["ranking"] for seed, stage in stages.items()}
        against = {seed: stage["against"] for seed, stage in stages.items()}
        good = planted["good"] / sum(planted.values())
        lines.append(Ranked(arm, sections[arm], found, good, len(stages), against))
    return lines


def rankings(found: Sequence[Ranked], reference: str = "") -> Cells:
    """AUC of good rows against others, and the share of good rows among those kept, for each selector."""
    shares = found[0].shares
    cells = [["selector", "AUC", *([f"less `{reference}`"] * bool(reference)),
              *(f"good of {100 * float(share):g} % kept" for share in shares)]]  # fmt: skip
    for one in found:
        beside = [one.less(reference)] if reference else []
        cells.append([one.name, one.auc, *beside, *map(one.precision, shares)])
    return cells


@dataclass(frozen=True)
class Saving:
    """Selection and alignment on what it kept, beside alignment on the whole pool.  Processor seconds by seed."""

    selected: Made
    whole: Made

    @property
    def selection(self) -> dict[int, float]:
        return self.selected.seconds("curate")

    @property
    def shares(self) -> list[float]:
        """(selection + alignment on the subset) / alignment on the pool."""
        full, ours = self.whole.seconds("align"), self.selected.seconds("curate", "align")
        return [ours[seed] / full[seed] for seed in ours if seed in full]

    @property
    def break_even_epochs(self) -> list[float]:
        """The epochs from which on selection has paid for itself: its time / what each epoch of the subset saves."""
        full, subset, cost = self.whole.seconds("align"), self.selected.seconds("align"), self.selection
        return [cost[seed] * self.whole.epochs / (full[seed] - subset[seed]) for seed in cost if seed in full]


def savings(results: Mapping[str, Any]) -> list[Saving]:
    """Every arm that aligns on selected rows, with the one that aligns alike on all of them."""
    arms = made(results)
    whole = {repr(one.align): one for one in arms.values() if one.curate is None}
    return [Saving(one, whole[repr(one.align)]) for one in arms.values() if one.curate and repr(one.align) in whole]


def spread(values: Sequence[float], scale: float = 1, digits: int = 3, within: tuple[float, float] = (0, 1)) -> str:
    """The mean with its t interval over seeds, cut to the values that are possible: `0.912 [0.880, 0.944]`."""
    mean = fmean(values)
    if len(values) < 2:
        return f"{scale * mean:.{digits}f}"
    low, high = (min(within[1], max(within[0], end)) for end in mean_interval(values, LEVEL))
    return _shown(mean, Interval(low, high), scale, digits)


def _wider(mean: float, rows: Interval, values: Sequence[float], within: tuple[float, float]) -> Interval:
    """The interval over rows, or Student's t over the seeds' values where that reaches further."""
    low, high = rows
    if len(values) > 1:
        over_seeds = mean_interval(values, LEVEL)
        low, high = min(low, over_seeds.low), max(high, over_seeds.high)
    return Interval(max(within[0], low), min(within[1], high))


def _shown(mean: float, interval: Interval, scale: float = 1, digits: int = 3, sign: str = "") -> str:
    low, high = (f"{scale * end:{sign}z.{digits}f}" for end in interval)
    return f"{scale * mean:{sign}z.{digits}f} [{low}, {high}]"


def as_markdown(cells: Iterable[Sequence[str]]) -> str:
    """A table whose first line is its heading."""
    clean = [[(cell or NOTHING).replace("|", "\\|") for cell in line] for line in cells]
    clean.insert(1, ["---", *(["---:"] * (len(clean[0]) - 1))])
    return "\n".join("| " + " | ".join(line) + " |" for line in clean)
