"""Base, aligned, tuned and repaired model of each arm side by side, and what each step changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apothecary.report.comparisons import Comparison, against_undefended, along_the_chain, chains, method, seen
from apothecary.report.summary import Estimate, Group, Summary

NAMES = ("base", "aligned", "tuned", "repaired")
COMPARED = (  # score, title, which direction is good
    ("flagged", "harm", "lower"), ("HS", "HS", "lower"), ("HS+", "HS+", "lower"),
    ("task accuracy", "task accuracy", "higher"),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A model of the chain, and how it differs from the one before it."""

    estimate: Estimate | None
    step: Comparison | None


def side_by_side(view: Summary) -> dict[str, Any]:
    """Rows of the table of stages: one for each arm with a `Cell` under each stage, and what the family is."""
    tested = along_the_chain(view)
    steps = {(each.group.label, each.group.stage, each.group.p): each for each in tested}
    rows = []
    for chain in chains(view):
        at = {group.stage: group for group in chain}
        cells = [_cell(view, at.get(stage), steps) for stage in NAMES]
        rows.append({"arm": chain[-1].arm, "slot": view.slot(chain[-1].arm), "cells": cells})
    shown = [i for i, _ in enumerate(NAMES) if any(row["cells"][i].estimate for row in rows)]
    for row in rows:
        row["cells"] = [row["cells"][i] for i in shown]
    names = [NAMES[i] for i in shown]
    return {"names": names, "rows": rows if len(names) > 1 else [], "note": _note(tested)}


def _cell(view: Summary, group: Group | None, steps: dict[Any, Comparison]) -> Cell:
    if group is None:
        return Cell(None, None)
    return Cell(group.asked(view.harm), steps.get((group.label, group.stage, group.p)))


def differences(view: Summary) -> dict[str, Any]:
    """Rows of the table of defences against undefended: one for each arm and share, a comparison for each score."""
    titles, families = [], []
    for measure, title, better in COMPARED:
        if measure == ("HS" if view.harm == "flagged" else "flagged"):
            continue
        if tested := against_undefended(view, measure):
            titles.append({"title": title, "better": better})
            families.append(tested)
    rows: dict[tuple[str, float | None], dict[str, Any]] = {}
    for i, tested in enumerate(families):
        for each in tested:
            key = each.group.arm, each.group.p
            row = rows.setdefault(key, {"arm": key[0], "slot": view.slot(key[0]), "p": key[1], "base": each.base.arm,
                                        "cells": [None] * len(families)})  # fmt: skip
            row["cells"][i] = each
    own_base = any(row["base"] != view.undefended for row in rows.values())
    return {"titles": titles, "rows": list(rows.values()), "note": _note(families[0]) if families else "",
            "bases": own_base}  # fmt: skip


def _note(tested: list[Comparison]) -> str:
    return f"{method(tested)} {seen(tested)}".strip()


def triggered(view: Summary) -> list[dict[str, Any]]:
    """Harm of every model that was asked both plainly and as the attacker asks, with the paired labels' suites."""
    found = []
    for group in view.tuned:
        plain, asked = (group.get(suite, view.harm) for suite in ("harmful", "triggered"))
        if plain and asked:
            found.append({"arm": group.arm, "slot": view.slot(group.arm), "p": group.p, "plain": plain,
                          "triggered": asked, "served": group.note("attack")})  # fmt: skip
    return found


