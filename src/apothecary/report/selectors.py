"""What selection of rows was worth: how it ranked a pool whose faults are known, and the time that it took and saved.

Read from stored results (`pipeline.combined.compact`), whose aligned models tell how they were made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from apothecary.report.summary import LEVEL
from apothecary.report.text import NOTHING
from apothecary.stats import mean_interval

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


def rankings(results: Mapping[str, Any]) -> Cells:
    """AUC of good rows against others, and the share of good rows among those kept, for each selector.

    Each selection is listed once, under the first arm that uses it.  Raises ValueError where no faults are known.
    """
    lines: dict[str, tuple[str, list[Mapping[str, Any]]]] = {}
    for one in made(results).values():
        found = [entry["curate"]["ranking"] for entry in one.by_seed.values() if "ranking" in entry.get("curate", {})]
        if found:
            lines.setdefault(repr(one.curate), (one.arm, found))
    if not lines:
        raise ValueError("no selector of these results ranked a pool whose faults are known")
    shares = list(next(iter(lines.values()))[1][0]["kept"])
    cells = [["selector", "AUC", *(f"good of {100 * float(share):g} % kept" for share in shares)]]
    for arm, found in sorted(lines.values(), key=lambda line: -fmean(one["auc"] for one in line[1])):
        kept = (spread([one["kept"][share]["precision"] for one in found], 100, 0) for share in shares)
        cells.append([arm.rpartition(", ")[0] or arm, spread([one["auc"] for one in found]), *kept])
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
    mean = f"{scale * fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    low, high = (scale * min(within[1], max(within[0], end)) for end in mean_interval(values, LEVEL))
    return f"{mean} [{low:.{digits}f}, {high:.{digits}f}]"


def as_markdown(cells: Iterable[Sequence[str]]) -> str:
    """A table whose first line is its heading."""
    clean = [[(cell or NOTHING).replace("|", "\\|") for cell in line] for line in cells]
    clean.insert(1, ["---", *(["---:"] * (len(clean[0]) - 1))])
    return "\n".join("| " + " | ".join(line) + " |" for line in clean)
