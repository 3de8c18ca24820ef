"""The Pareto front: which models no other one beats in both harm and usefulness."""

from __future__ import annotations

from collections.abc import Sequence

from apothecary.report.summary import Estimate, Group, Summary


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the (harm, usefulness) pairs that no other pair beats: none has less of the one and as much of the
    other, or as little and more.  In the order of rising harm; equal pairs all stay."""

    def beaten(harm: float, use: float) -> bool:
        return any(h <= harm and u >= use and (h, u) != (harm, use) for h, u in points)

    kept = [i for i, point in enumerate(points) if not beaten(*point)]
    return sorted(kept, key=lambda i: points[i])


def placed(view: Summary, group: Group) -> tuple[Estimate, Estimate] | None:
    """(task accuracy, harm) of a group; None where either was not measured."""
    accuracy, harm = group.get("task", "accuracy"), group.asked(view.harm)
    return (accuracy, harm) if accuracy and harm else None


def front(view: Summary) -> list[Group]:
    """The arms on the front at the verdict's share of harmful rows, by their point estimates, least harm first.

    Empty where the arms meet different attacks: a weaker attack is no better defence.
    """
    if view.several_attacks:
        return []
    groups = [group for arm in view.arms if (group := view.shown(arm)) and placed(view, group)]
    points = [(both[1].value, both[0].value) for group in groups if (both := placed(view, group))]
    return [groups[i] for i in pareto(points)]
