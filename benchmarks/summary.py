"""From measured rounds to ratios, and what they are held against.

A ratio is formed within a round; its median over the rounds is reported with the smallest and the largest.  T-Vaccine's
is the mean over its draws of layers, its scoring included once in 200 steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from benchmarks.configurations import BASELINE, CONFIGURATIONS
from benchmarks.subjects import LAYOUTS

RESCORE = 200  # T-Vaccine's default: steps between scores of the layers


@dataclass(frozen=True)
class Target:
    """`quantity` of a configuration relative to another one's, or in bytes where there is none."""

    layout: str
    name: str
    limit: float
    quantity: str = "step"  # time of a step ("passes": without the optimiser); or bytes: saved, weights, logits
    against: str | None = BASELINE
    strict: bool = False  # below the limit, not at most


def targets(chunk: int) -> list[Target]:
    """The issue's targets; `chunk` is the size in bytes of the logits that the product forms at a time."""
    found = [
        Target("lora", "vaccine", 2.03), Target("full", "vaccine", 1.75),
        Target("lora", "vaccine, merged probe", 1.95, strict=True),
        Target("lora", "t_vaccine", 1.98), Target("full", "t_vaccine", 1.45),
        Target("lora", "booster", 3.05), Target("full", "booster", 2.95),
        Target("lora", "security_vectors", 1.03), Target("full", "security_vectors", 1.03),
    ]  # fmt: skip
    for layout in LAYOUTS:
        found += [
            Target(layout, "t_vaccine", 1.0, "saved", "vaccine", strict=True),
            Target(layout, "booster", 2.1, "weights"),  # `.grad` and one tensor more for each weight
            Target(layout, "repnoise", 0.9, "step", "repnoise, reference"),
            Target(layout, "repnoise", chunk, "logits", None),
        ]
    return found


def seconds(steps: list[dict[str, float]], quantity: str) -> float:
    """Mean time of a round's steps of one configuration."""
    return mean(step["passes"] + (step["optimiser"] if quantity == "step" else 0.0) for step in steps)


def ratios(rounds: list[dict[str, Any]], layout: str, name: str, against: str, quantity: str) -> list[float]:
    """One ratio for each round that measured both."""
    found = [entry[layout] for entry in rounds if layout in entry and {name, against} <= entry[layout].keys()]
    return [seconds(times[name], quantity) / seconds(times[against], quantity) for times in found]


def measured(rounds: list[dict[str, Any]], layout: str, name: str, against: str,
             quantity: str) -> dict[str, float] | None:  # fmt: skip
    """The ratio over all rounds with its spread; None where no round measured both."""
    values = ratios(rounds, layout, name, against, quantity)
    if not values:
        return None
    if name == "t_vaccine":
        scoring = ratios(rounds, layout, "t_vaccine, scoring", against, "passes")
        values = [value + (median(scoring) / RESCORE if scoring else 0.0) for value in values]
    value = mean(values) if CONFIGURATIONS[name].draws > 1 else median(values)
    return {"ratio": value, "least": min(values), "most": max(values), "rounds": len(values)}


def summarise(result: dict[str, Any], chunk: int) -> dict[str, Any]:
    """Ratios to plain SFT of everything measured, and each target with what was found."""
    rounds, memory = result["rounds"], result["memory"]
    table = {
        layout: {
            name: {quantity: measured(rounds, layout, name, BASELINE, quantity) for quantity in ("step", "passes")}
            for name in CONFIGURATIONS
            if measured(rounds, layout, name, BASELINE, "step")
        }
        for layout in LAYOUTS
    }
    checks = []
    for target in targets(chunk):
        found = reached(rounds, memory.get(target.layout, {}), target)
        if found is not None:
            met = found < target.limit if target.strict else found <= target.limit
            checks.append({**target.__dict__, "found": found, "met": met})
    return {"relative to sft": table, "targets": checks}


def reached(rounds: list[dict[str, Any]], memory: dict[str, dict[str, int]], target: Target) -> float | None:
    """The number that a target speaks of; None where it was not measured."""
    if target.quantity in ("step", "passes"):
        assert target.against is not None
        found = measured(rounds, target.layout, target.name, target.against, target.quantity)
        return found["ratio"] if found else None
    if target.name not in memory or (target.against and target.against not in memory):
        return None
    value = memory[target.name][target.quantity]
    return value / memory[target.against][target.quantity] if target.against else float(value)
