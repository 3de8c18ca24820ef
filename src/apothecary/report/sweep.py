"""The page of an attacker's sweep: each defence's worst case beside the default attack, and how it was searched.

Self-contained like the report of a run; its one script, which sorts the table of trials, is named by its digest in the
page's security policy, and the page is complete without it.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from apothecary.pipeline.store import write_atomic, writing
from apothecary.report import page, sections, stages, sweep_evidence, sweep_plots
from apothecary.report.sweep_text import arm_rows, columns, guard_heads, guard_rows, remarks, sentence, trial_rows
from apothecary.report.tables import proxy_note

HERE = Path(__file__).parent
PAGE = "sweep.html"


def write_sweep_report(results: dict[str, Any], path: Path) -> Path:
    """Write the page for `results` (the content of sweep.json) to `path`, in one step, and return it."""
    path = Path(path)
    with writing("the report", path.parent):
        write_atomic(path, render(results))
    return path


def render(results: dict[str, Any]) -> str:
    """The page as a string."""
    from markupsafe import Markup

    script = (HERE / "sweep_sort.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made, colours = page._environment(), slots(results)
    made.globals.update(slot=colours.__getitem__)
    evidence = sweep_evidence.view(results)
    measured, scores = sweep_evidence.scores(results)
    return made.get_template("sweep.html.j2").render(
        results=results, style=Markup((HERE / "style.css").read_text("utf-8")), script=Markup(script), digest=digest,
        sentence=sentence(results), remarks=remarks(results), note=note(results), arms=arm_rows(results),
        plane=Markup(sweep_plots.plane(results, colours)), curves=Markup(sweep_plots.curves(results, colours)),
        columns=columns(results), trials=trial_rows(results), settings=page._yaml(results["recipe"]),
        importance=_importance(results), view=evidence, categories=sections.categories(evidence),
        triggered=stages.triggered(evidence),
        exam=sweep_evidence.exam(results), measured=measured, scores=scores, redact=True, sampled="worst case",
        cards=sweep_evidence.cards(results, colours), costs=sweep_evidence.costs(results),
        methods=sections.methods(sweep_evidence.view(results, "default")),
        guard_heads=guard_heads(results), guard_rows=guard_rows(results),
    )  # fmt: skip


def slots(results: dict[str, Any]) -> dict[str, int]:
    """The colour and marker of each arm; the first, which the others are compared with, has number 0."""
    return {arm["arm"]: number for number, arm in enumerate(results["arms"])}


def note(results: dict[str, Any]) -> str:
    """What the judge can and cannot say."""
    return proxy_note(sweep_evidence.view(results))


def _importance(results: dict[str, Any]) -> list[tuple[str, list[float | None]]]:
    """(setting, its weight for each arm), those that matter most first."""
    found = [arm["importance"] or {} for arm in results["arms"]]
    keys = dict.fromkeys(key for each in found for key in each)
    rows = [(key, [each.get(key) for each in found]) for key in keys]
    return sorted(rows, key=lambda row: -max(value or 0.0 for value in row[1]))
