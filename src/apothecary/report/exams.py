"""What is known of the judge behind the scores: who it is, what its exam showed, and how far judges agree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from apothecary.report.summary import Estimate, Group, Summary
from apothecary.report.text import bounds, number, ratio

if TYPE_CHECKING:
    from apothecary.judge.exam import Report

LONG = 60  # characters of a setting that is shown
UNFIT = "exam and answers do not fit, since no harm rate explains how many are flagged; they are not like its items"
SIDES = ("sensitivity", "specificity")


def suites(view: Summary) -> Iterator[Mapping[str, Any]]:
    """The scores on harmful prompts of every model, as they were asked for the harm that is shown."""
    for group in view.groups:
        yield from group.scores(group.way)


def exams(view: Summary) -> dict[str, Mapping[str, Any]]:
    """The exam of each judge, by name; the further judges follow."""
    return {name: found["exam"] for name, found in _judges(view) if found.get("exam")}


def _judges(view: Summary) -> list[tuple[str, Mapping[str, Any]]]:
    """Every judge's name and scores, once for each model."""
    scored = list(suites(view))
    first = [(str(suite["judge"]), suite) for suite in scored if suite.get("judge")]
    return first + [(name, found) for suite in scored for name, found in (suite.get("judges") or {}).items()]


def told(view: Summary) -> str:
    """The exams, for every table; it says so where a judge has sat none."""
    return " ".join(said(view).values())


def said(view: Summary) -> dict[str, str]:
    """A sentence on the exam of each judge, by name; older results, which know of no exams, have none."""
    known = exams(view)
    found = {name: f"Exam of `{name}`: {_figures(exam)}." for name, exam in known.items()}
    absent = {name for name, scores in _judges(view) if "identity" in scores and name not in known}
    return found | {name: f"`{name}` has sat no exam: its errors are unknown." for name in sorted(absent)}


def _figures(exam: Mapping[str, Any]) -> str:
    parts = [f"{side} {_share(exam, side)}" for side in SIDES]
    return f"{', '.join(parts)}, a verdict on {_share(exam, 'coverage')} of {exam['items']} items"


def _share(exam: Mapping[str, Any], name: str) -> str:
    value, (low, high) = exam.get(name), exam["intervals"][name]
    return "unknown" if value is None else f"{number(value)} % {bounds(Estimate(value, low, high, 0))}"


def corrected(view: Summary, group: Group) -> Estimate | None:
    """Harm freed of the judge's known errors (judge/exam.py), over the seeds on one set of prompts; None without exam,
    and where the exam does not allow it.

    The mean share of the seeds is corrected as if one model had given it, so the interval knows prompts and exam, not
    the luck of training.
    """
    from apothecary.judge.exam import corrected_rate

    counted = _counted(view, group)
    if counted is None:
        return None
    flagged, report = counted
    rate, (low, high) = corrected_rate(round(flagged.value * flagged.n), flagged.n, report)
    return None if math.isnan(rate) else Estimate(rate, low, high, flagged.n, flagged.seeds)


def misfit(view: Summary, group: Group) -> bool:
    """Whether the exam and these answers do not fit (judge/exam.py)."""
    from apothecary.judge import exam

    counted = _counted(view, group)
    return counted is not None and exam.misfit(round(counted[0].value * counted[0].n), counted[0].n, counted[1])


def _counted(view: Summary, group: Group) -> tuple[Estimate, Report] | None:
    """The share that is flagged as the attacker asks, and the judge's exam."""
    found, suite = group.asked("flagged" if view.harm == "flagged" else "HS"), _suite(group)
    if found is None or not suite.get("exam") or "flagged" not in suite:
        return None
    from apothecary.judge.exam import Kind, Report

    kinds = {name: Kind(**kind) for name, kind in suite["exam"]["kinds"].items()}
    return group.asked("flagged") or found, Report({}, "", kinds)


def section(view: Summary) -> dict[str, Any]:
    """The page's part on the judges: figures, kinds of items, and harm as judged beside harm as corrected."""
    lines = []
    for group in view.groups:
        fixed, unfit = corrected(view, group), misfit(view, group)
        if _shown(view, group) and (fixed or unfit):
            lines.append({"label": group.label, "slot": view.slot(group.arm) if group.stage == "tuned" else None,
                          "judged": group.asked("flagged"), "corrected": fixed})  # fmt: skip
    found = [{"name": name, "figures": _figures(exam), "kinds": exam["kinds"]} for name, exam in exams(view).items()]
    return {"exams": found, "lines": lines, "agreements": agreements(view)}


def _shown(view: Summary, group: Group) -> bool:
    """Whether the verdict speaks of a group or of what comes before or after it."""
    tuned = view.shown(group.arm)
    return group.p is None or (tuned is not None and group.p == tuned.p)


def _suite(group: Group) -> Mapping[str, Any]:
    return next(iter(group.scores(group.way)), {})


def about_judge(view: Summary, group: Group) -> list[str]:
    """Sentences on identity, coverage, exam and agreement for one model."""
    suite = _suite(group)
    fixed = corrected(view, group)
    freed = [f"Harm corrected for these errors: {number(fixed.value)} % {bounds(fixed)}."] if fixed else []
    freed += [f"Harm is not corrected for these errors: {UNFIT}."] if misfit(view, group) else []
    return [*_identity(suite), *_coverage(suite), *freed, *agreements(view)]


def _identity(suite: Mapping[str, Any]) -> Iterator[str]:
    identity = suite.get("identity")
    if isinstance(identity, Mapping):
        flat = {key: value for key, value in identity.items() if isinstance(value, (str, int, float)) and value != ""}
        yield "Identity: " + ", ".join(f"{key} `{str(value)[:LONG]}`" for key, value in flat.items()) + "."
    elif suite.get("judge"):
        yield f"Judge `{suite['judge']}`; its identity is not stored."


def _coverage(suite: Mapping[str, Any]) -> Iterator[str]:
    if suite.get("coverage") is not None:
        yield f"It gave a verdict on {ratio(suite['coverage'])} of {suite['n']} answers."
    if suite.get("reason"):
        yield f"Harm is not shown: {suite['reason']}."


def agreements(view: Summary) -> list[str]:
    """Cohen's kappa of each two judges: the lowest over the models."""
    found: dict[str, list[tuple[float, Any]]] = {}
    for suite in suites(view):
        for pair, each in (suite.get("agreement") or {}).items():
            if each.get("kappa") is not None:
                found.setdefault(pair, []).append((each["kappa"], each.get("interval")))
    said = []
    for pair, values in found.items():
        kappa, interval = min(values, key=lambda each: each[0])
        span = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
        lowest = f", the lowest of {len(values)} models" if len(values) > 1 else ""
        said.append(f"Agreement of {pair}: Cohen's kappa {kappa:.2f}{span}{lowest}.")
    return said
