"""The table of scores as Markdown, for the documentation: each arm beside the one that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from apothecary.report.paired import difference
from apothecary.report.summary import PLAIN, Group, Summary, summarise
from apothecary.report.tables import measured, proxy_note
from apothecary.report.text import NOTHING, bounds, listed, number, points, ratio

SHOWN = ("HS", "HS+", "refuses", "over-refusal", "benign answered", "task accuracy")
SIDES = {-1: "lower", 0: "not told apart", 1: "higher", None: NOTHING}
TESTED = ("HS less the base's, in points, paired by prompt: one seed is tested by McNemar; several differ where the "
          "bootstrap over prompts and the t interval over seeds both exclude zero.")  # fmt: skip


def markdown(results: dict[str, Any], base: str | None = None, only: str = "*") -> str:
    """One line for each arm and p whose name fits one of the patterns `only`, "a*|b*", and what the numbers are.

    The last column tells by how much HS differs from that of the base at the same p, prompt by prompt: the arm `base`,
    in which `{align}` stands for the alignment method of the arm compared, or else the arm without a defence that has
    the same rows and the same training.
    """
    view = summarise(results)
    columns = [column for column in measured(view) if column.title in SHOWN]
    chosen = [group for group in view.groups if any(fnmatchcase(group.label, each) for each in only.split("|"))]
    against = {(group.label, group.p): found for group in chosen if (found := _base(view, group, base))}
    cells = [["model", "harmful rows", *(column.title for column in columns), *(["HS against"] * bool(against))]]
    for group in chosen:
        scores = [group.get(column.suite, column.measure) for column in columns]
        line = [group.label, NOTHING if group.p is None else ratio(group.p)]
        line += [NOTHING if score is None else f"{number(score.value)} {bounds(score)}" for score in scores]
        cells.append([*line, _side(group, against.get((group.label, group.p)))] if against else line)
    cells.insert(1, ["---", *(["---:"] * (len(columns) + 1)), *(["---"] * bool(against))])
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
    return "\n".join([*lines, "", _notes(view, bool(against))])


def _side(group: Group, base: Group | None) -> str:
    if base is None:
        return NOTHING
    found = difference(group, base)
    amount = f" {points(found)}" if found else ""
    return f"{SIDES[found and found.side]}{amount}: {base.label}"


def _base(view: Summary, group: Group, name: str | None) -> Group | None:
    """The group that this one is compared with, if any."""
    if group.stage != "tuned":
        return None
    arms: Mapping[str, Any] = {arm["name"]: arm for arm in view.results.get("recipe", {}).get("arms", ())}
    if name is None and group.arm in arms:
        name = next((other for other in arms if other != group.arm and _undefended(arms[other], arms[group.arm])), None)
    found = view.at(name.replace("{align}", str(group.methods[1])), group.p) if name else None
    return None if found is group else found


def _undefended(other: Mapping[str, Any], arm: Mapping[str, Any]) -> Any:
    """Whether `other` is `arm` without its defence."""
    methods = tuple(other[kind] and other[kind]["method"] for kind in ("curate", "align", "finetune"))
    return methods == PLAIN and arm["align"] and arm["finetune"] and _conditions(other) == _conditions(arm)


def _conditions(arm: Mapping[str, Any]) -> Any:
    """What an arm has in common with its undefended one: rows, the attacker and the training of both stages."""
    data = {role: arm["data"].get(role) for role in ("align", "customer", "attack", "general")}
    attack = arm["attack"] and {key: value for key, value in arm["attack"].items() if key != "p"}
    return data, attack, arm["align"]["train"], arm["finetune"]["train"], arm["finetune"]["adapter"]


def _notes(view: Summary, tested: bool) -> str:
    models = [model for group in view.groups for model in group.models]
    seeds = sorted({model["seed"] for model in models})
    over = f"mean over seeds {listed(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0] if seeds else NOTHING}"
    sizes = {suite: scores["n"] for model in models for suite, scores in model["scores"].items()}
    prompts = [f"{n} {suite}" for suite, n in sizes.items()]
    return " ".join([f"Percent [95 % interval], {over}; prompts: {listed(prompts)}.", *([TESTED] * tested),
                     proxy_note(view)])  # fmt: skip
