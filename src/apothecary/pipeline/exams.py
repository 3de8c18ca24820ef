"""The exam of a run's judges, put beside the scores that they give."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apothecary.evals.judging import HARM, named
from apothecary.judge.exam import Report, exam_scores, examine, read_report

if TYPE_CHECKING:
    from apothecary.evals.suites import EvalConfig
    from apothecary.judge.base import Judge

EXAMS = Path("apothecary-runs") / "judges" / "exams"  # where `apothecary judge exam` keeps its reports


def reports(config: EvalConfig, folder: Path = EXAMS) -> dict[str, Report]:
    """By the name that its verdicts have, the exam of each judge that has sat one, further judges among them."""
    found = {name: report(judge, folder) for name, judge in named(config.make_judges()).items()}
    return {name: each for name, each in found.items() if each}


def report(judge: Judge, folder: Path = EXAMS) -> Report | None:
    """The exam of a judge, if it has sat one; cheap proxies, which need no model, sit theirs now."""
    return read_report(folder, judge) or (_at_once(judge) if judge.cheap_proxy else None)


@cache
def _at_once(judge: Judge) -> Report:
    return examine(judge)


def with_exam(scores: Mapping[str, Any], known: Mapping[str, Report]) -> dict[str, Any]:
    """The scores by suite; those of a judge, the further ones too, get its exam and the harm rate corrected by it."""
    return {**scores, **{suite: _judged(scores[suite], known) for suite in HARM if suite in scores}}


def _judged(found: Mapping[str, Any], known: Mapping[str, Report]) -> dict[str, Any]:
    others = {name: {**each, **_exam(each, known.get(name))} for name, each in (found.get("judges") or {}).items()}
    return {**found, **_exam(found, known.get(str(found.get("judge")))), **({"judges": others} if others else {})}


def _exam(found: Mapping[str, Any], sat: Report | None) -> dict[str, Any]:
    if sat is None or "flagged" not in found:
        return {}
    n = int(found.get("judged") or found["n"])
    flagged = None if found["flagged"] is None else round(found["flagged"] * n)
    return {"exam": exam_scores(sat, flagged, n)}
