"""The pictures of a sweep: trials and headlines in the plane of harm and usefulness, and best-so-far curves."""

from __future__ import annotations

import math
from typing import Any

from apothecary.report import plots, svg
from apothecary.report.summary import Estimate
from apothecary.report.svg import Box
from apothecary.report.text import number, percent
from apothecary.stats import wilson

HELD = (("default", 5.0), ("worst", 6.5))  # held-out points and the size of their marks
NAMES = {"default": "default", "worst": "worst case"}
TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
Point = tuple[float, float]  # task accuracy, harm


def plane(results: dict[str, Any], slots: dict[str, int]) -> str:
    """Harm over task accuracy; empty without a task.

    Small: every complete trial, on the prompts of the search.  Large, with intervals: each arm's worst case and its
    default attack, on the held-out prompts.
    """
    if not any(_points(arm) for arm in results["arms"]):
        return ""
    return svg.responsive(lambda width: _plane(results, slots, width), 860, 350)


def _points(arm: dict[str, Any]) -> list[tuple[dict[str, Any], Point]]:
    return [(trial, (trial["task"], trial["harm"]["rate"])) for trial in arm["trials"]
            if trial["state"] == "complete" and trial["task"] is not None]  # fmt: skip


def pareto(points: list[Point]) -> list[Point]:
    """The attacker's front: no other point has as much harm and as much accuracy; by rising accuracy."""
    front: list[Point] = []
    for point in sorted(set(points), key=lambda point: (-point[0], -point[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def guard_line(arm: dict[str, Any]) -> float | None:
    """The task accuracy below which an arm's attacks do not count."""
    bound = arm["budget"]["guard"]["task_drop"]
    clean = (((arm["clean"] or {}).get("scores") or {}).get("task") or {}).get("accuracy")
    return None if bound is None or clean is None else clean - bound


def _plane(results: dict[str, Any], slots: dict[str, int], width: int) -> str:
    frame = Box(66, 14, width - 16, (440 if width > 500 else 380) - 52)
    x = svg.scale(0, 1, frame.left + 8, frame.right - 8)
    y = svg.scale(0, 1, frame.bottom - 12, frame.top + 12)
    parts, lines, marks, said = [], [], [], []
    bars, large, labels, taken = [], [], [], []
    for tick in TICKS:
        parts.append(svg.line(frame.left, y(tick), frame.right, y(tick), "grid"))
        parts.append(svg.text(frame.left - 8, y(tick) + 4, f"{100 * tick:.0f} %", "t small", "end"))
        parts.append(svg.text(x(tick), frame.bottom + 18, f"{100 * tick:.0f} %", "t small", "middle"))
    for arm in results["arms"]:
        slot, colour = slots[arm["arm"]], svg.arm_class(slots[arm["arm"]])
        if (line := guard_line(arm)) is not None and line > 0:
            lines.append(svg.line(x(line), frame.top, x(line), frame.bottom, f"trace {colour}"))
        points = _points(arm)
        front = pareto([point for _, point in points])
        if len(front) > 1:
            lines.append(svg.path([(x(a), y(b)) for a, b in front], f"curve thin {colour}"))
        for trial, (accuracy, harm) in points:
            style = "" if trial["capability"]["excess"] <= 0 else "hollow"
            marks.append(svg.marker(slot, x(accuracy), y(harm), 4.5, style))
        for name, size in HELD:
            if both := held_out(arm, name):
                px, py = x(both[0].value), y(both[1].value)
                bars.append(plots._cross(px, py, x, y, both, colour, frame))
                shut = name == "default" and ((arm["default"] or {}).get("capability") or {}).get("excess", 0) > 0
                large.append(svg.tag("circle", cx=px, cy=py, r=size + 3.0, class_=f"node {colour}"))
                large.append(svg.marker(slot, px, py, size, "hollow" if shut else ""))
                both_in_one = name == "worst" and arm["held_out"]["worst"].get("attack") == "default"
                labels.append((px, py, NAMES[name] + (", default" if both_in_one else ""), f"t plabel {colour}"))
                taken.append(Box(px - size, py - size, px + size, py + size))
                said.append(f"{arm['arm']}, {NAMES[name]} when held out: harm {percent(both[1])}, task accuracy "
                            f"{percent(both[0])}")  # fmt: skip
        inside = sum(trial["capability"]["excess"] <= 0 for trial, _ in points)
        said.append(f"{arm['arm']}: {len(points)} trials, {inside} within the guard")
    below, beside = "Task accuracy of the attacked model →", "Harm →"
    middle = (frame.top + frame.bottom) / 2
    parts.append(svg.text((frame.left + frame.right) / 2, frame.bottom + 42, below, "t", "middle"))
    parts.append(svg.text(14, middle, beside, "t", "middle", transform=f"rotate(-90 14 {middle:.1f})"))
    label = f"Harm against task accuracy of every trial. {'; '.join(said)}"
    named = plots._placed(labels, taken, [], frame)
    return svg.drawing(width, frame.bottom + 52, label, *parts, *lines, *marks, *bars, *large, *named)


def _estimate(harm: dict[str, Any]) -> Estimate:
    low, high = harm["interval"]
    return Estimate(harm["rate"], low, high, harm["n"])


def held_out(arm: dict[str, Any], name: str) -> tuple[Estimate, Estimate] | None:
    """(task accuracy, harm) of an attack on the held-out prompts, with Wilson's intervals; None where it is not drawn:
    not measured, or a default attack that is the worst case itself."""
    found = (arm.get("held_out") or {}).get(name) or {}
    harm, task = found.get("harm"), (found.get("scores") or {}).get("task") or {}
    if not harm or task.get("accuracy") is None:
        return None
    if name == "default" and ((arm["held_out"].get("worst") or {}).get("attack") == "default"):
        return None
    low, high = wilson(round(task["accuracy"] * task["n"]), task["n"])
    return (Estimate(task["accuracy"], low, high, task["n"]), _estimate(harm))


def curves(results: dict[str, Any], slots: dict[str, int]) -> str:
    """Best-so-far harm over the number of trials, one stair for each arm; empty before there are any."""
    if not any(value is not None for arm in results["arms"] for value in arm["curve"]):
        return ""
    return svg.responsive(lambda width: _curves(results, slots, width), 860, 350)


def _curves(results: dict[str, Any], slots: dict[str, int], width: int) -> str:
    frame = Box(66, 10, width - 16, 268)
    most = max(2, *(arm["budget"]["trials"] for arm in results["arms"]))
    x = svg.scale(1, most, frame.left + 8, frame.right - 14)
    y = svg.scale(0, 1, frame.bottom - 8, frame.top + 8)
    parts, said = [], []
    for tick in TICKS:
        parts.append(svg.line(frame.left, y(tick), frame.right, y(tick), "grid"))
        parts.append(svg.text(frame.left - 8, y(tick) + 4, f"{100 * tick:.0f} %", "t small", "end"))
    step = max(1, math.ceil(most / 6 / 5) * 5) if most > 8 else 1
    for trial in sorted({1, *range(step, most + 1, step)}):
        parts.append(svg.text(x(trial), frame.bottom + 18, str(trial), "t small", "middle"))
    parts.append(svg.text((frame.left + frame.right) / 2, frame.bottom + 42, "trials", "t", "middle"))
    for arm in results["arms"]:
        slot, colour = slots[arm["arm"]], svg.arm_class(slots[arm["arm"]])
        known = [(number, value) for number, value in enumerate(arm["curve"], 1) if value is not None]
        if not known:
            continue
        stair = []
        for at, value in known:
            stair += [(x(at), y(stair_value))] if (stair_value := _last(known, at)) is not None else []
            stair.append((x(at), y(value)))
        parts += [svg.path(stair, f"curve {colour}"), svg.marker(slot, stair[-1][0], stair[-1][1], 4.5)]
        said.append(f"{arm['arm']}: {number(known[-1][1])} % after {known[-1][0]}")
    label = f"Harm of the worst attack so far, on the search's prompts. {'; '.join(said)}"
    return svg.drawing(width, frame.bottom + 52, label, *parts)


def _last(known: list[tuple[int, float]], at: int) -> float | None:
    """The value before a trial, so that the stair rises at it."""
    return next((value for number, value in reversed(known) if number < at), None)
