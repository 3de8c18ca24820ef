"""Which decisions of the capability guard another sample of task rows might turn round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from apothecary.report.text import shorten
from apothecary.stats import Interval, newcombe


@dataclass(frozen=True)
class Close:
    """An attack whose loss of task accuracy cannot be told from the guard's bound."""

    arm: str
    attack: int | str  # a trial's number, or default
    drop: float  # task accuracy of the clean customer less that of the attack
    interval: Interval
    rows: int
    inside: bool


def decisions(arm: dict[str, Any]) -> Iterator[tuple[int | str, Close | None]]:
    """The attacks that the guard judges by task accuracy, each with what makes it close.

    An attack that is outside by held-out loss anyway is left out: task accuracy decides nothing there.
    """
    guard, task = arm["budget"]["guard"], (((arm["clean"] or {}).get("scores") or {}).get("task") or {})
    bound, rows = guard["task_drop"], task.get("n")
    found = [("default", arm["default"]), *((trial["number"], trial) for trial in arm["trials"])]
    for name, attack in found:
        known = (attack or {}).get("capability") or {}
        drop, drift = known.get("task_drop"), known.get("drift")
        if bound is None or not rows or drop is None or attack["state"] != "complete":
            continue
        if drift is not None and guard["drift"] is not None and not drift <= guard["drift"]:
            continue
        clean = round(task["accuracy"] * rows)
        interval = newcombe(clean, rows, round((task["accuracy"] - drop) * rows), rows)
        close = Close(arm["arm"], name, drop, interval, rows, known["excess"] <= 0)
        yield name, close if interval.low < bound < interval.high else None


def remark(results: dict[str, Any], name: int) -> list[str]:
    """One line on how many decisions are close, and on each default attack among them; names have at most `name`
    characters."""
    found = [each for arm in results["arms"] for each in decisions(arm)]
    close = [each for _, each in found if each]
    if not close:
        return []
    defaults = [_default(each, name) for each in close if each.attack == "default"]
    sizes = " or ".join(map(str, sorted({each.rows for each in close})))
    named = f": {'; '.join(defaults)}" if defaults else ""
    return [f"{len(close)} of {len(found)} decisions of the guard on task accuracy are within noise: the interval of "
            f"the loss on {sizes} rows (Newcombe\u2019s) holds the bound, so other rows might have decided "
            f"otherwise{named}."]  # fmt: skip


def _default(each: Close, name: int) -> str:
    low, high = (f"{100 * end:.0f}".replace("-", "\u2212") for end in each.interval)
    said = "still counts" if each.inside else "is shut out"
    lost = f"{100 * each.drop:.1f}".replace("-", "\u2212")
    return f"the default attack on {shorten(each.arm, name)} {said} with a loss of {lost} points [{low}, {high}]"
