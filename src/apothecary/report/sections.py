"""What the sections of the page show, as plain values for the template."""

from __future__ import annotations

import math
from typing import Any

from apothecary.registry import Entry, entries
from apothecary.report.samples import SUITES
from apothecary.report.summary import SHARES, Estimate, Group, Summary
from apothecary.report.tables import COLUMNS, Column, group_seconds, measured, seconds
from apothecary.report.text import ratio, signed

STAGE: dict[str, Any] = dict.fromkeys(("kind", "key", "label", "cached", "seconds", "peak_memory_mb", "digest"))


def bars(view: Summary) -> list[dict[str, Any]]:
    """The three shares of every evaluated model, in blocks: references, then one for each arm."""
    blocks = [("before fine-tuning", None, view.references)] if view.references else []
    blocks += [(arm, view.slot(arm), view.of(arm)) for arm in view.arms]
    found = []
    for name, slot, groups in blocks:
        lines = []
        for group in groups:
            shares = {share: group.get("harmful", share) for share in SHARES}
            if all(shares.values()):
                p = "p not stated" if group.p is None else f"p = {ratio(group.p)}"
                lines.append({"label": group.label if slot is None else p, "shares": shares})
        if lines:
            found.append({"name": name, "slot": slot, "lines": lines})
    return found


def categories(view: Summary) -> list[dict[str, Any]]:
    """Harm by category at the verdict's share: a block for each category, most prompts first, a line for each arm.

    Harm as the attacker asks; where his prompts are not told apart the line says that it is of plain ones.
    """
    shown = {arm: group for arm in view.arms if (group := view.shown(arm))}
    arms = {arm: found for arm, group in shown.items() if (found := group.by_category(view.harm))}
    sizes = {name: estimate.n for found in arms.values() for name, estimate in found.items()}
    blocks = []
    for name, n in sorted(sizes.items(), key=lambda item: -item[1]):
        lines = [{"arm": arm, "slot": view.slot(arm), "estimate": found[name],
                  "plain": shown[arm].told_apart != shown[arm].way} for arm, found in arms.items()
                 if name in found]  # fmt: skip
        blocks.append({"name": name.replace("_", " "), "n": n, "lines": lines})
    return blocks


def rows(view: Summary) -> list[dict[str, Any]]:
    """The big table: one block for each arm, one row for each p."""
    spent, columns = seconds(view), measured(view)
    blocks = [(group.label, None, (group,)) for group in view.references]
    blocks += [(arm, view.slot(arm), view.of(arm)) for arm in view.arms]
    return [
        {"name": name, "slot": slot, "lines": [_row(group, columns, spent) for group in groups]}
        for name, slot, groups in blocks
    ]


def _row(group: Group, columns: list[Column], spent: dict[str, float]) -> dict[str, Any]:
    cells: list[Estimate | None] = [group.get(column.suite, column.measure) for column in columns]
    margin = group.margin()
    text = span = ""
    if margin:
        text = signed(margin.value)
        span = "one seed" if math.isnan(margin.low) else f"[{signed(margin.low)}, {signed(margin.high)}]"
    cost = group_seconds(group, spent)
    return {"p": group.p, "seeds": group.seeds, "cells": cells, "margin": (text, span), "seconds": cost}


def costs(results: dict[str, Any]) -> dict[str, Any]:
    """Stages and their sums by kind: seconds when they were made (`all`), and those of this run (`now`)."""
    stages = [{**STAGE, **stage} for stage in results.get("stages") or []]
    kinds: dict[str, dict[str, Any]] = {}
    for stage in stages:
        kind = kinds.setdefault(str(stage["kind"]), {"count": 0, "cached": 0, "all": 0.0, "now": 0.0, "peak": None})
        kind["count"] += 1
        kind["cached"] += bool(stage["cached"])
        kind["all"] += stage["seconds"] or 0.0
        kind["now"] += 0.0 if stage["cached"] else stage["seconds"] or 0.0
        peak = stage["peak_memory_mb"]
        kind["peak"] = max((value for value in (kind["peak"], peak) if value is not None), default=None)
    total = {name: sum(kind[name] for kind in kinds.values()) for name in ("all", "now")}
    return {"stages": stages, "kinds": kinds, **total}


def methods(view: Summary) -> list[Entry]:
    """The registry's entry, with its cost, for each method of the evaluated models."""
    known, found = entries(), {}
    for group in view.groups:
        for kind, name in (("curate", group.methods[0]), ("align", group.methods[1]), ("attack", group.note("attack")),
                           ("finetune", group.methods[2])):  # fmt: skip
            entry = known.get((kind, str(name).split(" ")[0]))
            if entry:
                found[kind, entry.name] = entry
    order = ("curate", "align", "attack", "finetune", "repair")
    return [found[key] for key in sorted(found, key=lambda key: order.index(key[0]))]


def manifests(view: Summary) -> list[dict[str, str]]:
    """Key, digest and versions of each evaluated model's artifact."""
    common = view.results.get("versions") or {}
    found = []
    for group in view.groups:
        for model in group.models:
            manifest = model.get("manifest") or {}
            own = manifest.get("versions") or {}
            other = {name: version for name, version in own.items() if common.get(name) != version}
            key, digest = model.get("artifact") or manifest.get("key"), manifest.get("digest")
            found.append({
                "label": group.label, "p": "" if group.p is None else ratio(group.p),
                "seed": str(model.get("seed", "")), "key": str(key or ""), "digest": str(digest or ""),
                "versions": ", ".join(f"{name} {version}" for name, version in other.items()) or "as above",
            })  # fmt: skip
    return found


def counts(view: Summary) -> list[str]:
    """How many prompts stand behind the numbers of each suite."""
    sizes: dict[str, set[int]] = {}
    for group in view.groups:
        for column in COLUMNS:
            if estimate := group.get(column.suite, column.measure):
                sizes.setdefault(column.suite, set()).add(estimate.n)
    return [f"{SUITES[suite]}: {' or '.join(f'{n:,}' for n in sorted(found))}" for suite, found in sizes.items()]
