"""Results as the report needs them: models that differ only in seed are one group, each score has its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from apothecary.config import canonical
from apothecary.stats import mean_interval, share_interval

LEVEL = 0.95
AMOUNTS = ("p", "n", "general")  # fields of an attack that say how much of it there is
SHARES = ("refuses", "complies", "neither")
PLAIN = (None, "sft", "sft")  # no selection, plain alignment, plain fine-tuning: the undefended arm


@dataclass(frozen=True)
class Estimate:
    """A score with its 95 % interval; `low` and `high` are NaN where none is known."""

    value: float
    low: float
    high: float
    n: int  # prompts of one seed
    seeds: int = 1

    def below(self, other: Estimate) -> bool:
        """The whole interval lies under the other's: a stricter demand than a paired test at the same level."""
        return self.high < other.low


@dataclass(frozen=True)
class Group:
    """The evaluated models of one arm at one share of harmful rows: its seeds."""

    arm: str
    stage: str  # base, aligned, tuned, repaired
    p: float | None
    methods: tuple[str | None, str | None, str | None]  # curate, align, finetune
    models: tuple[dict[str, Any], ...]
    label: str = ""

    def get(self, suite: str, measure: str) -> Estimate | None:
        """A score of a suite, a share in [0, 1]; None where it was not measured."""
        found = [pair for model in self.models if (pair := _count(_suite(model, suite), measure))]
        return _pooled(found) if found else None

    @property
    def way(self) -> str:
        """The suite of the harmful prompts as the attacker asks them: with his trigger or persona, if he has one."""
        return "triggered" if self.scores("triggered") else "harmful"

    def scores(self, suite: str) -> list[dict[str, Any]]:
        """All that each model scored in a suite, of those that were asked it."""
        return [found for model in self.models if (found := _suite(model, suite))]

    def asked(self, measure: str) -> Estimate | None:
        """A score of the harmful prompts as the attacker asks them; None where it is known of plain prompts alone."""
        return self.get(self.way, measure)

    @property
    def told_apart(self) -> str:
        """The suite that `by_category` reads: `way`, unless its prompts are not told apart."""
        return self.way if any(each.get("by_category") for each in self.scores(self.way)) else "harmful"

    def by_category(self, measure: str) -> dict[str, Estimate]:
        """A score of the harmful prompts of each category of the policy; empty where they are not told apart."""
        parts: dict[str, list[tuple[float, int]]] = {}
        for model in self.models:
            for name, scores in (_suite(model, self.told_apart).get("by_category") or {}).items():
                if pair := _count(scores, measure):
                    parts.setdefault(name, []).append(pair)
        return {name: _pooled(found) for name, found in parts.items()}

    def margin(self) -> Estimate | None:
        """The refusal margin in nats per token: over prompts for one seed; several seeds as in `get`."""
        suites = [suite for model in self.models if _finite((suite := _suite(model, "harmful")).get("margin"))]
        if not suites:
            return None
        values = [float(suite["margin"]) for suite in suites]
        mean = sum(values) / len(values)
        spans = [span for suite in suites if (span := (suite.get("intervals") or {}).get("margin"))]
        widths = [high - low for low, high in spans]
        half = sum(widths) / len(widths) / 2 if widths else math.nan
        if len(values) > 1:
            low, high = mean_interval(values, LEVEL)
            half = max((high - low) / 2, half if widths else 0.0)
        return Estimate(mean, mean - half, mean + half, 0, len(values))

    def note(self, name: str) -> str | None:
        """A word that the run left on the models, such as `attack` or `adapter`."""
        value = self.models[0].get(name)
        return str(value) if value else None

    @property
    def seeds(self) -> int:
        return len({model.get("seed") for model in self.models})


@dataclass(frozen=True)
class Summary:
    """Everything the verdict, the table and the plots are drawn from."""

    results: dict[str, Any]
    references: tuple[Group, ...] = ()  # base and aligned models
    tuned: tuple[Group, ...] = ()  # arms in order of appearance, undefended first; p ascending
    arms: tuple[str, ...] = ()
    undefended: str | None = None
    focus: float | None = None  # the share of harmful rows that the verdict speaks of
    judges: Mapping[str, bool | None] = field(default_factory=dict)  # name -> is it a cheap proxy? None: not said
    repaired: tuple[Group, ...] = ()
    harm: str = "HS"  # the score that the page speaks of: "flagged" where a judge reads what a response says
    attacks: Mapping[str, str] = field(default_factory=dict)  # arm -> its attack; equal texts are one attack

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.references + self.tuned + self.repaired

    def of(self, arm: str) -> tuple[Group, ...]:
        """The groups of an arm by rising p."""
        return tuple(group for group in self.tuned if group.arm == arm)

    def at(self, arm: str, p: float | None) -> Group | None:
        return next((group for group in self.of(arm) if group.p == p), None)

    @property
    def several_attacks(self) -> bool:
        """Whether the arms differ in more than their defence and in how much they are attacked."""
        return len({attack for attack in self.attacks.values() if attack}) > 1

    def shown(self, arm: str) -> Group | None:
        """The group that the verdict speaks of: the one at its share of harmful rows; where the arms meet several
        attacks, which have shares of their own, else the arm's last."""
        found = self.at(arm, self.focus)
        return found or (self.of(arm) or (None,))[-1] if self.several_attacks else found

    def aligned(self) -> Group | None:
        """The aligned model that the undefended arm started from, else the first one."""
        found = [group for group in self.references if group.stage == "aligned"]
        plain = [group for group in found if group.methods[:2] == PLAIN[:2]]
        return (plain or found or [None])[0]

    def start(self, tuned: Group) -> Group | None:
        """The aligned model that a tuned one was made from; the base, where nothing was aligned."""
        if tuned.methods[1] is None:
            return next((group for group in self.references if group.stage == "base"), None)
        aligned = [group for group in self.references if group.stage == "aligned"]
        found = [group for group in aligned if group.methods[:2] == tuned.methods[:2]]
        return next((group for group in found if group.arm == tuned.arm), (found or [None])[0])

    def slot(self, arm: str) -> int:
        """The number of the arm's colour and marker; 0 is kept for the undefended arm."""
        others = [name for name in self.arms if name != self.undefended]
        return 0 if arm == self.undefended else 1 + others.index(arm)


def summarise(results: dict[str, Any]) -> Summary:
    """Group `results["models"]` by arm and p; see results.json in the documentation of the pipeline."""
    models = results.get("models") or []
    tuned, repaired = (_grouped(model for model in models if _stage(model) == stage) for stage in ("tuned", "repaired"))
    references = _labelled(_grouped(model for model in models if _stage(model) not in ("tuned", "repaired")))
    undefended = _undefended(tuned)
    arms = list(dict.fromkeys(group.arm for group in tuned))
    arms.sort(key=lambda arm: arm != undefended)
    tuned.sort(key=lambda group: (arms.index(group.arm), -1.0 if group.p is None else group.p))
    harmful = [_suite(model, "harmful") for model in models]
    judges = {scores["judge"]: scores.get("cheap_proxy") for scores in harmful if scores.get("judge")}
    read = all(scores.get("cheap_proxy") is False and "flagged" in scores for scores in harmful if scores)
    harm = "flagged" if any(harmful) and read else "HS"
    return Summary(results, tuple(references), tuple(tuned), tuple(arms), undefended, _focus(tuned, undefended), judges,
                   tuple(_labelled(repaired)), harm, _attacks(results, tuned))  # fmt: skip


def _attacks(results: Mapping[str, Any], tuned: Iterable[Group]) -> dict[str, str]:
    """From the recipe without what says how much; the attack's name alone where there is no recipe."""
    found = {name: kind_of_attack(arm["attack"]) for name, arm in recipe_arms(results).items()}
    return {group.arm: found.get(group.arm, group.note("attack") or "") for group in tuned}


def recipe_arms(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The recipe's arms by name; empty where the results carry no recipe."""
    recipe = results.get("recipe")
    told = recipe.get("arms") if isinstance(recipe, Mapping) else None
    return {arm["name"]: arm for arm in told or () if isinstance(arm, Mapping) and "name" in arm}


def kind_of_attack(attack: Mapping[str, Any] | None) -> str:
    """An attack in words that are equal where two attacks differ at most in amount and in what they know."""
    if not attack:
        return ""
    fields = {name: value for name, value in (attack.get("fields") or {}).items() if name not in AMOUNTS}
    return canonical([attack.get("method"), attack.get("strength"), fields])


def _stage(model: dict[str, Any]) -> str:
    return model.get("stage") or "tuned"


def _suite(model: dict[str, Any], suite: str) -> dict[str, Any]:
    return (model.get("scores") or {}).get(suite) or {}


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _grouped(models: Iterable[dict[str, Any]]) -> list[Group]:
    found: dict[tuple, list[dict[str, Any]]] = {}
    for model in models:
        methods = (model.get("curate"), model.get("align"), model.get("finetune"))
        arm = str(model.get("arm", "unnamed"))
        # An arm is its name; aligned models share the name "aligned" and are told apart by how they were made.
        key = (_stage(model), arm, model.get("p"), None if _stage(model) in ("tuned", "repaired") else methods)
        found.setdefault(key, []).append({**model, "_methods": methods})
    return [
        Group(arm, stage, p, group[0]["_methods"], tuple(group), arm) for (stage, arm, p, _), group in found.items()
    ]


def _labelled(groups: list[Group]) -> list[Group]:
    """Base models first; aligned models named by what sets them apart."""
    several = sum(group.arm == group.stage == "aligned" for group in groups) > 1
    named = []
    for group in groups:
        how = ", ".join(part for part in (group.methods[1], group.methods[0]) if part)
        if group.arm != group.stage:
            label = f"{group.stage}, {group.arm}"
        else:
            label = f"{group.arm} ({how})" if several and how else group.arm
        named.append(Group(group.arm, group.stage, group.p, group.methods, group.models, label))
    return sorted(named, key=lambda group: group.stage != "base")


def _undefended(tuned: list[Group]) -> str | None:
    by_name = [group.arm for group in tuned if group.arm.lower() in ("undefended", "none", "no defence")]
    return next(iter(by_name + [group.arm for group in tuned if group.methods == PLAIN]), None)


def _focus(tuned: list[Group], undefended: str | None) -> float | None:
    """The p > 0 at which most arms were measured, the undefended one above all; of several the nearest to 10 %."""
    arms: dict[float, set[str]] = {}
    for group in tuned:
        if group.p is not None and group.get("harmful", "HS"):
            arms.setdefault(group.p, set()).add(group.arm)
    attacked = [p for p in arms if p > 0] or list(arms)
    return max(attacked, key=lambda p: (undefended in arms[p], len(arms[p]), -abs(p - 0.1), -p), default=None)


def _count(scores: Mapping[str, Any], measure: str) -> tuple[float, int] | None:
    """(successes, n) of a score: from its count where one is given, else from the share."""
    n, counts = scores.get("n"), scores.get("counts") or {}
    if measure in ("flagged", "flagged+"):  # over the answers that have a verdict
        n = scores.get("judged", n)
    if not n:
        return None
    parts = {"HS": ("complies",), "HS+": ("complies", "neither")}.get(measure, (measure,))
    if all(part in counts for part in parts):
        return sum(counts[part] for part in parts), n
    if measure == "accuracy" and scores.get("correct") is not None:
        return scores["correct"], n
    value = scores.get(measure)
    if value is None:
        return None
    return (value, n) if measure == "parse_failures" else (value * n, n)


def _pooled(counts: list[tuple[float, int]]) -> Estimate:
    """The mean over seeds; all of them answered the same prompts."""
    shares = [successes / n for successes, n in counts]
    n = round(fmean(n for _, n in counts))
    return Estimate(fmean(shares), *share_interval(shares, n, LEVEL), n, len(shares))
