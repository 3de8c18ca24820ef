"""Attackers who know the defence: whether that gains them anything, and what they found out before they attacked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from apothecary.report.by_attack import NAME, defence, named
from apothecary.report.comparisons import Comparison, adaptive_arms, against_plain
from apothecary.report.summary import Group, Summary
from apothecary.report.text import listed, percent, shorten

CHANGED = (("learning_rate", "learning rate"), ("epochs", "epochs"))


def remarks(view: Summary) -> list[str]:
    """What the numbers of adaptive arms say, each beside the arm that differs from it in this alone."""
    shown = [group for arm in adaptive_arms(view) if (group := view.shown(arm)) and defence(group)]
    tested = [each for each in against_plain(view) if any(each.group is group for group in shown)]
    return [*_gains(view, tested), *_alone(shown, tested), *_learnt(shown)]


def _gains(view: Summary, tested: list[Comparison]) -> list[str]:
    gains = [f"{named(view, each.group)} for {percent(plain)}" for each in tested
             if each.side > 0 and (plain := each.base.asked(view.harm))]  # fmt: skip
    rest = [named(view, each.group) for each in tested if each.side <= 0]
    said = [f"Knowing the defence gains the attacker: {listed(gains)}."] if gains else []
    return said + ([f"Knowing the defence gains the attacker nothing measurable: {listed(rest)}."] if rest else [])


def _alone(shown: list[Group], tested: list[Comparison]) -> list[str]:
    alone = [group for group in shown if not any(each.group is group for each in tested)]
    if not alone:
        return []
    return [f"Whether knowing the defence gains the attacker anything cannot be said of "
            f"{listed(shorten(group.arm, NAME) for group in alone)}: no arm was evaluated that differs in this "
            "alone."]  # fmt: skip


def _learnt(shown: list[Group]) -> list[str]:
    """What each attacker found, of the first seed."""
    said = [f"{shorten(group.arm, NAME)}: {told}" for group in shown if (told := learnt(group.models[0]))]
    return [f"What the attackers who know the defence did: {'; '.join(said)}."] if said else []


def learnt(model: Mapping[str, Any]) -> str:
    """What an attacker who adapts found and did (train/adaptive.py), in words; empty where none is stored."""
    found = model.get("adapted") or {}
    if "radius" in found:
        return _radius(found)
    if "loss_of_uploaded" in found:
        return (f"uploaded rows that the vectors miss most, {_figure(found['loss_of_uploaded'])} nats per token under "
                f"them ({_figure(found['loss_of_candidates'])} over all {found['candidates']} candidates)")  # fmt: skip
    if "odds_before" in found:
        return (f"took a direction out of the released weights that lowers the log odds of a refusal from "
                f"{_figure(found['odds_before'])} to {_figure(found['odds'])}")  # fmt: skip
    return ""


def _radius(found: Mapping[str, Any]) -> str:
    tried, training = found.get("tried") or [{}], found.get("training") or {}
    factors = [f"{training[key] / tried[0][key]:g} times the {word}" for key, word in CHANGED
               if training.get(key) and tried[0].get(key) and training[key] != tried[0][key]]  # fmt: skip
    how = f"trained with {listed(factors)}" if factors else "trained as the plain attacker"
    span = f"moved {_figure(found.get('moved'))}, radius {_figure(found['radius'])}"
    if found.get("past"):
        return f"{how}, {'past the radius' if factors else 'who is past the radius already'} ({span})"
    most = f"the furthest of {len(tried)} trainings that were tried" if len(tried) > 1 else "all that was tried"
    return f"{how}, {most}, and stayed within the radius ({span})"


def _figure(value: float | None) -> str:
    return "unknown" if value is None or not math.isfinite(value) else f"{value:.3g}"
