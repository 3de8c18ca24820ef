"""From a recipe to its stages: which models there will be, and how each comes about.  Nothing is run or downloaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from apothecary.config import to_dict
from apothecary.data.sources import DataSource, source_digest
from apothecary.evals.suites import SUITES
from apothecary.models.digest import weights_digest
from apothecary.pipeline.recipe import Align, Arm, Attack, Curate, Finetune, Recipe, Section, defends_with_harmful
from apothecary.pipeline.stage import Stage
from apothecary.pipeline.steps import attacking, evaluation, planting, rows, selection, training
from apothecary.registry import entries

KINDS = ("data", "overlap", "curate", "align", "prepare", "attack", "plant", "finetune", "tamper", "evaluate")
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
        first = {key: stage for key, stage in found.items() if _reads_rows_only(stage)}
        return {**first, **found}

    def rows_only(self) -> list[Stage]:
        return [stage for stage in self.stages().values() if _reads_rows_only(stage)]

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

    @cached_property
    def asking(self) -> dict[str, Any]:
        return evaluation.settings(self.recipe.evaluate)

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
            result.models.extend(self._tuned(arm) if arm.finetune or (arm.attack and arm.attack.tampers) else ())
        order = {name: i for i, name in enumerate(("base", "aligned", *(arm.name for arm in recipe.arms)))}
        result.models.sort(key=lambda model: order[model.arm])  # stable: an arm's aligned models before its tuned ones
        return result

    def _tuned(self, arm: Arm) -> Iterator[Planned]:
        for seed in self.recipe.seeds:
            aligned = {"align": self._align(arm, seed)} if arm.align else {}
            for p, fields in arm.attack.points() if arm.attack else [(None, {})]:
                at = f"{arm.name}{'' if p is None else f', p = {p:g}'} (seed {seed})"
                section = replace(arm.attack, fields=fields) if arm.attack else None
                upload = self._attack(arm, section, seed, aligned) if section and not section.tampers else None
                chain = dict(aligned)
                if arm.finetune:
                    given = {"rows": self._planted(upload or self._role(arm, "customer")), **aligned}
                    if upload and upload.config.get("defence"):
                        given["attack"] = upload  # which may change the training, too
                    extra = {"adapter": arm.finetune.adapter}
                    chain["finetune"] = self._train(arm, arm.finetune, seed, given, at, extra)
                if section and section.tampers:
                    chain["tamper"] = self._tamper(arm, section, seed, chain, at)
                ask = self._evaluate(chain, at, self._served(arm, section))
                yield Planned(arm.name, "tuned", seed, ask, [*chain.values()][-1], upload, p, arm)

    def _align(self, arm: Arm, seed: int) -> Stage:
        assert arm.align is not None
        pool = self._role(arm, "align")
        pool = self._curate(arm, arm.curate, pool, seed) if arm.curate else pool
        return self._train(arm, arm.align, seed, {"rows": pool}, f"{arm.name or 'aligned'} (seed {seed})", {})

    def _curate(self, arm: Arm, section: Curate, pool: Stage, seed: int) -> Stage:
        inputs = {"rows": pool, **self._aux(arm, section.roles)}
        label = f"curate {section.method} {section.keep:.0%}: {arm.name or 'aligned'} (seed {seed})"
        return self._method("curate", label, selection.curate, section, seed, inputs, {"keep": section.keep})

    def _attack(self, arm: Arm, section: Attack, seed: int, aligned: Mapping[str, Stage]) -> Stage:
        """What the customer uploads; the attacker looks at the aligned model if he must, or adapts to the defence."""
        roles = dict.fromkeys((*section.roles, "general"))
        inputs = {role: self._role(arm, role) for role in roles if role in arm.data}
        point = f" p = {section.fields['p']:g}" if "p" in section.fields else ""
        label = f"attack {section.method}{point} (seed {seed})"
        defence = arm.defence if arm.adapts and section.fields.get("p") != 0 else None
        if not (defence or section.make().needs.model):
            config = {"method": section.method, "fields": section.fields, "seed": _seed(section, seed)}
            return Stage("attack", label, rows.attack, config, inputs, modules=_modules(section))
        known = None
        if defence and arm.finetune:
            label = f"attack {section.method}{point} against {defence.method}: {arm.name} (seed {seed})"
            known = {"name": defence.method, "fields": defence.fields, "train": to_dict(defence.train),
                     "tuning": to_dict(arm.finetune.train)}  # fmt: skip
            inputs |= self._prepared(arm, defence, seed, aligned)
        return self._method("attack", label, attacking.upload, section, seed, {**inputs, **aligned}, {"defence": known})

    def _tamper(self, arm: Arm, section: Attack, seed: int, chain: Mapping[str, Stage], label: str) -> Stage:
        inputs = {**chain, **self._aux(arm, section.roles)}
        label = f"tamper {section.method}: {label}"
        return self._method("tamper", label, attacking.tamper, section, seed, inputs, {"adaptive": arm.adapts})

    def _served(self, arm: Arm, attack: Attack | None) -> list[Section]:
        """The methods of an arm whose prompts or answers are changed wherever its model is asked."""
        found = [part for part in (arm.align, attack, arm.finetune) if part is not None]
        return [section for section in found if section.make().serving() is not None]

    def _train(self, arm: Arm, section: Align | Finetune, seed: int, inputs: Mapping[str, Stage], label: str,
               extra: Mapping[str, Any]) -> Stage:  # fmt: skip
        kind = section.kind
        needs = section.make().needs
        inputs = {**inputs, **self._aux(arm, needs.roles), **self._prepared(arm, section, seed, inputs)}
        config = {"train": to_dict(section.train), **extra}
        return self._method(kind, f"{kind} {section.method}: {label}", training.train, section, seed, inputs, config)

    def _prepared(self, arm: Arm, section: Align | Finetune, seed: int,
                  inputs: Mapping[str, Stage]) -> dict[str, Stage]:  # fmt: skip
        """What the method's `prepare` makes of the aligned model, if it has one."""
        needs = section.make().needs
        if not needs.prepared:
            return {}
        given = {name: inputs[name] for name in ("align",) if name in inputs} | self._aux(arm, needs.every_role)
        what = f"prepare {section.method}: {arm.name or 'aligned'} (seed {seed})"
        return {"prepared": self._method("prepare", what, training.prepare, section, seed, given, {})}

    def _method(self, kind: str, label: str, run: Any, section: Section, seed: int, inputs: Mapping[str, Stage],
                config: Mapping[str, Any]) -> Stage:  # fmt: skip
        """A stage that runs a method on a model."""
        full = {"model": to_dict(self.recipe.model), "kind": section.kind, "method": section.method,
                "fields": section.fields, "seed": _seed(section, seed), **config}  # fmt: skip
        if self.recipe.allow_contradicting_rows:  # else the keys of all stages would be others
            full["allow_contradicting_rows"] = True
        stage = Stage(kind, label, run, full, inputs, self.weights, _modules(section))
        return self._stages.setdefault(stage.key, stage)  # one object, one label, however many arms share it

    def _evaluate(self, chain: Mapping[str, Stage], label: str, served: Sequence[Section] = ()) -> Stage:
        settings = self.recipe.evaluate
        inputs = dict(chain)
        for suite in SUITES:
            for i, source in enumerate(getattr(settings, suite)):
                inputs[f"suite.{suite}.{i}"] = self._read(source, "prompt", f"{suite} prompts")
        config = {"model": to_dict(self.recipe.model), **self.asking}
        config["serving"] = [{"kind": s.kind, "method": s.method, "fields": s.fields} for s in served]
        judges = (entries()["judge", name].module for name, _ in settings.choices())
        modules = (*judges, *(name for s in served for name in _modules(s)))
        leaves = {**self.weights, **evaluation.leaves(settings)}
        return Stage("evaluate", f"evaluate: {label}", evaluation.evaluate, config, inputs, leaves, modules)

    def _planted(self, rows: Stage) -> Stage:
        """The customer's rows with canaries among them, where leakage is to be measured."""
        leakage = self.recipe.evaluate.leakage
        if leakage is None:
            return rows
        config = {"fields": to_dict(leakage)}
        stage = Stage("plant", f"plant canaries: {rows.label}", planting.plant, config, {"rows": rows})
        return self._stages.setdefault(stage.key, stage)

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


def _reads_rows_only(stage: Stage) -> bool:
    """Whether it runs first: an attacker who looks at a model has to wait for it."""
    return stage.kind in ROWS_ONLY and "model" not in stage.config


def _seed(section: Section, seed: int) -> int:
    return seed if section.seed is None else section.seed


def _modules(section: Section) -> tuple[str, ...]:
    return (entries()[section.kind, section.method].module,)
