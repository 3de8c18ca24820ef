"""Comparisons in families: every difference in a table with its interval, adjusted p-value and detectable difference.

A family holds all comparisons that one table makes of one score: every defence against the undefended arm at each share
of harmful rows.  Its p-values are adjusted together (Holm 1979), so that the chance that the table calls any
two equal arms different stays below 5 %; the sentence of the verdict uses the adjusted values of the same family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from apothecary.config import canonical
from apothecary.report.paired import Difference, difference, side
from apothecary.report.summary import LEVEL, PLAIN, Group, Summary, recipe_arms
from apothecary.report.text import listed, point_size
from apothecary.stats import holm

ALIKE = "not distinguishable"
KINDS = ("curate", "align", "finetune")  # sections of an arm in which a defence may stand
SIDES = {-1: "lower", 0: ALIKE, 1: "higher"}


@dataclass(frozen=True)
class Comparison:
    """`group` less `base` on one score."""

    group: Group
    base: Group
    found: Difference
    p_value: float  # adjusted over the family
    detectable: float  # in shares, at the level that the family's size leaves to a single comparison

    @property
    def side(self) -> int:
        return side(self.found.value, self.p_value)

    @property
    def said(self) -> str:
        return SIDES[self.side]


def family(pairs: Iterable[tuple[Group, Group]], measure: str = "HS") -> list[Comparison]:
    """One comparison for each pair (group, base) whose labels are stored; adjusted over all of them."""
    found = [(a, b, each) for a, b in pairs if (each := difference(a, b, measure))]
    adjusted = holm([each.p_value for _, _, each in found])
    level = 1 - (1 - LEVEL) / max(1, len(found))
    return [
        Comparison(a, b, each, p, each.detectable(level)) for (a, b, each), p in zip(found, adjusted, strict=True)
    ]


def against_undefended(view: Summary, measure: str | None = None) -> list[Comparison]:
    """Every arm against its undefended twin, or else the undefended arm, at the same share of harmful rows."""
    pairs = [(group, twin(view, group) or _bare(view, group)) for group in view.tuned]
    apart = [(group, bare) for group, bare in pairs if bare and bare.arm != group.arm and group.methods != bare.methods]
    return family(apart, measure or view.harm)


def _bare(view: Summary, group: Group) -> Group | None:
    """The undefended arm at the same share, unless its attack is another one."""
    arm = view.undefended or ""
    return view.at(arm, group.p) if view.attacks.get(arm) == view.attacks.get(group.arm) else None


def twin(view: Summary, group: Group) -> Group | None:
    """The arm without a defence that has the same rows, the same attacker and the same training, at the same share."""
    arms = recipe_arms(view.results)
    if group.arm not in arms:
        return None
    alike = [other for other in arms if other != group.arm and _undefended(arms[other], arms[group.arm])]
    return view.at(min(alike, key=lambda name: _adaptive(arms[name])), group.p) if alike else None


def _undefended(other: Mapping[str, Any], arm: Mapping[str, Any]) -> bool:
    """Whether `other` is `arm` without its defence."""
    methods = tuple(other[kind] and other[kind]["method"] for kind in KINDS)
    return bool(methods == PLAIN and arm["align"] and arm["finetune"] and _conditions(other) == _conditions(arm))


def _conditions(arm: Mapping[str, Any]) -> Any:
    """What an arm has in common with its undefended twin: rows, the attacker and the training of both stages.

    Not what the attacker knows: where there is no defence to adapt to, he is the plain one.
    """
    data = {role: arm["data"].get(role) for role in ("align", "customer", "attack", "general")}
    attack = _plain(arm)
    if attack:
        attack["p"], attack["fields"] = None, {**(attack.get("fields") or {}), "p": None}
    return data, attack, arm["align"]["train"], arm["finetune"]["train"], arm["finetune"]["adapter"]


def _plain(arm: Mapping[str, Any]) -> dict[str, Any] | None:
    """The attack of an arm as one that knows nothing of the defence."""
    return {**arm["attack"], "adaptive": False} if arm["attack"] else None


def _adaptive(arm: Mapping[str, Any]) -> bool:
    return bool(arm["attack"] and arm["attack"].get("adaptive"))


def adaptive_arms(view: Summary) -> list[str]:
    """The arms whose attacker knows the defence, as far as the recipe tells."""
    told = recipe_arms(view.results)
    return [arm for arm in view.arms if arm in told and _adaptive(told[arm])]


def against_plain(view: Summary) -> list[Comparison]:
    """Every arm with an adaptive attack against the arm that differs from it in this alone."""
    arms = recipe_arms(view.results)
    same = {name: canonical({**arm, "name": None, "attack": _plain(arm)}) for name, arm in arms.items()}
    plain = {key: name for name, key in same.items() if not _adaptive(arms[name])}
    pairs = [(group, view.at(plain[same[group.arm]], group.p)) for group in view.tuned
             if group.arm in arms and _adaptive(arms[group.arm]) and same[group.arm] in plain]  # fmt: skip
    return family([(group, other) for group, other in pairs if other], view.harm)


def along_the_chain(view: Summary, measure: str | None = None) -> list[Comparison]:
    """Each model against the one that it was made from, at the verdict's share of harmful rows: one family."""
    pairs = [(group, base) for line in chains(view) for base, group in pairwise(line)]
    once = {(group.label, group.stage, base.label): (group, base) for group, base in pairs}
    return family(once.values(), measure or view.harm)


def chains(view: Summary) -> list[list[Group]]:
    """Base, aligned, tuned and, where there is one, repaired model of each arm, at the verdict's share."""
    base = [group for group in view.references if group.stage == "base"][:1]
    found = []
    for arm in view.arms:
        if tuned := view.shown(arm):
            start = view.start(tuned)
            aligned = [start] if start and start.stage == "aligned" else []
            repaired = [group for group in view.repaired if (group.arm, group.p) == (arm, tuned.p)]
            found.append([*base, *aligned, tuned, *repaired])
    return found


def seen(comparisons: list[Comparison]) -> str:
    """`With 300 prompts and 3 seeds, differences under 4.1 points cannot be seen.`"""
    by_size: dict[tuple[int, int], list[float]] = {}
    for each in comparisons:
        by_size.setdefault((each.found.prompts, each.found.seeds), []).append(each.detectable)
    said = []
    for (prompts, seeds), least in sorted(by_size.items()):
        low, high = point_size(min(least)), point_size(max(least))
        span = f"{low} points" if low == high else f"{low} to {high} points (by comparison)"
        said.append(f"with {prompts} prompts and {seeds} seed{'s' * (seeds > 1)}, differences under {span}")
    return f"{said[0][0].upper()}{listed(said)[1:]} cannot be seen." if said else ""


def method(comparisons: list[Comparison]) -> str:
    """What the numbers of the family are, in two sentences."""
    if not comparisons:
        return ""
    several = any(each.found.seeds > 1 for each in comparisons)
    test = "McNemar's exact test" + (", clustered by prompt, and a t test crossed with the seeds" if several else "")
    count = f"{len(comparisons)} comparisons of this table" if len(comparisons) > 1 else "single comparison"
    adjusted = f"adjusted over the {count} (Holm)" if len(comparisons) > 1 else f"of a {count}"
    return (
        "Differences in points of percent, each with its own 95 % interval, on the same prompts; "
        f"p by {test}, {adjusted}."
    )
