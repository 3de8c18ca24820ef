"""From a recipe to its stages: which models there will be, and how each comes about.  Nothing is run or downloaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from apothecary.config import to_dict
from apothecary.data.sources import DataSource, source_digest
from apothecary.evals.suites import SUITES
from apothecary.models.digest import weights_digest
from apothecary.pipeline.recipe import Align, Arm, Attack, Curate, Finetune, Recipe, Section, defends_with_harmful
from apothecary.pipeline.stage import Stage
from apothecary.pipeline.steps import evaluation, rows, selection, training
from apothecary.registry import entries

KINDS = ("data", "overlap", "curate", "align", "attack", "prepare", "finetune", "evaluate")
ROWS_ONLY = ("data", "overlap", "attack")  # stages without a model: they run first, so that bad input shows at once


@dataclass(frozen=True)
class Planned:
    """One model to evaluate: an entry of results.json."""

    arm: str  # base, aligned or the arm's name
    stage: str  # base, aligned or tuned
    seed: int
    evaluation: Stage
    model: Stage | None = None  # the stage that trains it
    attack: Stage | None = None
    p: float | None = None
    spec: Arm | None = None


@dataclass
class Plan:
    """All stages of a recipe, in the order in which a run executes them."""

    recipe: Recipe
    models: list[Planned] = field(default_factory=list)
    overlaps: dict[str, Stage] = field(default_factory=dict)  # arm -> comparison of its two kinds of harmful rows

    def stages(self) -> dict[str, Stage]:
        """Every stage once, by key, each after its inputs; those that read rows only come first."""
        attacks = [model.attack for model in self.models if model.attack]
        ends = [*self.overlaps.values(), *attacks, *(model.evaluation for model in self.models)]
        found: dict[str, Stage] = {}
        for stage in (stage for end in ends for stage in end.lineage()):
            found.setdefault(stage.key, stage)
        first = {key: stage for key, stage in found.items() if stage.kind in ROWS_ONLY}
        return {**first, **found}

    def of_kind(self, *kinds: str) -> list[Stage]:
        return [stage for stage in self.stages().values() if stage.kind in kinds]


def plan(recipe: Recipe) -> Plan:
    """The stages of a recipe; raises for data files and models that are not there."""
    return _Planner(recipe).plan()


class _Planner:
    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._data: dict[tuple[DataSource, str], Stage] = {}
        self._stages: dict[str, Stage] = {}

    @cached_property
    def weights(self) -> dict[str, str]:
        return {"weights": weights_digest(self.recipe.model)}

    def plan(self) -> Plan:
        recipe, result = self.recipe, Plan(self.recipe)
        for arm in recipe.arms:
            if arm.attack and defends_with_harmful(arm) and "attack" in arm.data:
                result.overlaps[arm.name] = self._overlap(arm)
        result.models.append(Planned("base", "base", recipe.seeds[0], self._evaluate({}, "base")))
        seen = set()
        for name, arm in [("aligned", recipe.base), *((arm.name, arm) for arm in recipe.arms)]:
            if arm.align is None or not _feasible(arm):
                continue
            for seed in recipe.seeds:
                model = self._align(arm, seed)
                if model.key not in seen:
                    seen.add(model.key)
                    ask = self._evaluate({"align": model}, f"{name} (seed {seed})")
                    result.models.append(Planned(name, "aligned", seed, ask, model, spec=arm))
        for arm in recipe.arms:
            result.models.extend(self._tuned(arm) if arm.finetune else ())
        order = {name: i for i, name in enumerate(("base", "aligned", *(arm.name for arm in recipe.arms)))}
        result.models.sort(key=lambda model: order[model.arm])  # stable: an arm's aligned models before its tuned ones
        return result

    def _tuned(self, arm: Arm) -> Iterator[Planned]:
        assert arm.finetune is not None
        for seed in self.recipe.seeds:
            aligned = {"align": self._align(arm, seed)} if arm.align else {}
            points = arm.attack.points() if arm.attack else [(None, {})]
            for p, fields in points:
                customer = self._attack(arm, arm.attack, fields, seed) if arm.attack else self._role(arm, "customer")
                at = f"{arm.name}{'' if p is None else f', p = {p:g}'} (seed {seed})"
                extra = {"adapter": arm.finetune.adapter}
                model = self._train(arm, arm.finetune, seed, {"rows": customer, **aligned}, at, extra)
                ask = self._evaluate({**aligned, "finetune": model}, at)
                yield Planned(arm.name, "tuned", seed, ask, model, customer if arm.attack else None, p, arm)

    def _align(self, arm: Arm, seed: int) -> Stage:
        assert arm.align is not None
        pool = self._role(arm, "align")
        pool = self._curate(arm, arm.curate, pool, seed) if arm.curate else pool
        return self._train(arm, arm.align, seed, {"rows": pool}, f"{arm.name or 'aligned'} (seed {seed})", {})

    def _curate(self, arm: Arm, section: Curate, pool: Stage, seed: int) -> Stage:
        inputs = {"rows": pool, **self._aux(arm, section.roles)}
        label = f"curate {section.method} {section.keep:.0%}: {arm.name or 'aligned'} (seed {seed})"
        return self._method("curate", label, selection.curate, section, seed, inputs, {"keep": section.keep})

    def _attack(self, arm: Arm, section: Attack, fields: dict[str, Any], seed: int) -> Stage:
        roles = dict.fromkeys(("customer", "attack", "general", *section.roles))
        inputs = {role: self._role(arm, role) for role in roles if role in arm.data}
        config = {"method": section.method, "fields": fields, "seed": _seed(section, seed)}
        point = f" p = {fields['p']:g}" if "p" in fields else ""
        label = f"attack {section.method}{point} (seed {seed})"
        return Stage("attack", label, rows.attack, config, inputs, modules=_modules(section))

    def _train(self, arm: Arm, section: Align | Finetune, seed: int, inputs: Mapping[str, Stage], label: str,
               extra: Mapping[str, Any]) -> Stage:  # fmt: skip
        kind = section.kind
        needs = section.make().needs
        inputs = {**inputs, **self._aux(arm, needs.roles)}
        if needs.prepared:
            start = {name: inputs[name] for name in ("align",) if name in inputs}
            what = f"prepare {section.method}: {arm.name or 'aligned'} (seed {seed})"
            inputs["prepared"] = self._method("prepare", what, training.prepare, section, seed,
                                              {**start, **self._aux(arm, needs.every_role)}, {})  # fmt: skip
        config = {"train": to_dict(section.train), **extra}
        return self._method(kind, f"{kind} {section.method}: {label}", training.train, section, seed, inputs, config)

    def _method(self, kind: str, label: str, run: Any, section: Section, seed: int, inputs: Mapping[str, Stage],
                config: Mapping[str, Any]) -> Stage:  # fmt: skip
        """A stage that runs a method on a model."""
        full = {"model": to_dict(self.recipe.model), "kind": section.kind, "method": section.method,
                "fields": section.fields, "seed": _seed(section, seed), **config}  # fmt: skip
        stage = Stage(kind, label, run, full, inputs, self.weights, _modules(section))
        return self._stages.setdefault(stage.key, stage)  # one object, one label, however many arms share it

    def _evaluate(self, chain: Mapping[str, Stage], label: str) -> Stage:
        settings = self.recipe.evaluate
        inputs = dict(chain)
        for suite in SUITES:
            for i, source in enumerate(getattr(settings, suite)):
                inputs[f"suite.{suite}.{i}"] = self._read(source, "prompt", f"{suite} prompts")
        config = {"model": to_dict(self.recipe.model), "judge": settings.judge, "limit": settings.limit,
                  "max_new_tokens": settings.max_new_tokens, "batch_size": settings.batch_size}  # fmt: skip
        modules = (entries()["judge", settings.judge].module,)
        return Stage("evaluate", f"evaluate: {label}", evaluation.evaluate, config, inputs, self.weights, modules)

    def _overlap(self, arm: Arm) -> Stage:
        inputs = {role: self._role(arm, role) for role in ("harmful", "attack")}
        return Stage("overlap", f"compare harmful rows: {arm.name}", rows.compare, {}, inputs)

    def _aux(self, arm: Arm, roles: Iterable[str]) -> dict[str, Stage]:
        return {f"aux.{role}": self._role(arm, role) for role in roles}

    def _role(self, arm: Arm, role: str) -> Stage:
        return self._read(arm.data[role], role, f"{role} rows")

    def _read(self, source: DataSource, role: str, label: str) -> Stage:
        name = (source, role)
        if name not in self._data:
            config = {"source": to_dict(source), "role": role}
            leaves = {"source": source_digest(source)}
            self._data[name] = Stage("data", f"{label}: {source.path}", rows.read, config, leaves=leaves)
        return self._data[name]


def _feasible(arm: Arm) -> bool:
    """Whether the top-level sections, which only arms have to complete, can be aligned as they are."""
    needed = {"align"} | {role for part in (arm.curate, arm.align) if part for role in part.roles}
    return needed <= set(arm.data)


def _seed(section: Section, seed: int) -> int:
    return seed if section.seed is None else section.seed


def _modules(section: Section) -> tuple[str, ...]:
    return (entries()[section.kind, section.method].module,)
