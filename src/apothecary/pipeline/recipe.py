"""The recipe: what a user writes, read and checked before any work.

A section names a `method`; keys that are not the section's own are the method's hyper-parameters.  An arm repeats only
what differs from the top-level sections; when it names another method, the old method's hyper-parameters are dropped
and the section's own settings (train, adapter, keep, seed) stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from apothecary.config import build, convert, load_yaml, override, to_dict, unknown_key
from apothecary.data.rows import ROLES
from apothecary.data.sources import DataSource
from apothecary.errors import ConfigError
from apothecary.evals.suites import SUITES, EvalConfig
from apothecary.models.settings import ModelConfig
from apothecary.pipeline.expected import Expected, check_expected
from apothecary.pipeline.overlay import on_lab
from apothecary.registry import lookup
from apothecary.train.config import TrainConfig

RESERVED = ("base", "aligned")


@dataclass(frozen=True)
class Section:
    """A chosen method: `fields` are all its hyper-parameters, defaults included."""

    kind: ClassVar[str]
    default: ClassVar[str | None] = None

    method: str
    seed: int | None = None  # fixes the seed of this section; None: the seeds of the recipe
    fields: dict[str, Any] = field(default_factory=dict, hash=False)

    def make(self, **changed: Any) -> Any:
        """The method itself."""
        return build(lookup(self.kind, self.method), {**self.fields, **changed}, self.kind)

    @property
    def roles(self) -> tuple[str, ...]:
        """Data roles that the method cannot do without, for its training or its preparation."""
        return self.make().needs.every_role


@dataclass(frozen=True)
class Curate(Section):
    kind = "curate"
    keep: float = 0.5  # share of the alignment rows that stay, in (0, 1]


@dataclass(frozen=True)
class Align(Section):
    kind = "align"
    default = "sft"
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Finetune(Section):
    kind = "finetune"
    default = "sft"
    adapter: Literal["merged", "single"] = "merged"  # merge the alignment and train a fresh adapter, or go on with its
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Attack(Section):
    kind = "attack"
    default = "harmful_mix"
    p: tuple[float, ...] | None = None  # shares of harmful rows, each an arm of its own; None: the method has none
    strength: Literal["lora", "full_parameter"] | None = None  # what the attacker trains; None: as in finetune
    adaptive: bool = False  # whether the attacker knows the arm's defence, its settings and what it has prepared

    def points(self) -> list[tuple[float | None, dict[str, Any]]]:
        """(p, hyper-parameters) of every attack."""
        return [(None, self.fields)] if self.p is None else [(p, {**self.fields, "p": p}) for p in self.p]

    @property
    def tampers(self) -> bool:
        """Whether the attack edits weights in place of uploading rows."""
        return lookup(self.kind, self.method).tampers()  # type: ignore[attr-defined]

    def training(self) -> dict[str, Any]:
        """What the attacker decides of the customer's training: his method's settings, then his strength."""
        own = self.make().training()
        return own if self.strength is None else {**own, "parameters": self.strength.removesuffix("_parameter")}


SECTIONS: dict[str, type[Section]] = {cls.kind: cls for cls in (Curate, Align, Attack, Finetune)}


@dataclass(frozen=True)
class Arm:
    """One way through the chain; a section that is None is left out."""

    name: str
    data: dict[str, DataSource] = field(hash=False)
    curate: Curate | None
    align: Align | None
    attack: Attack | None
    finetune: Finetune | None

    @property
    def defence(self) -> Align | Finetune | None:
        """The section whose defence an adaptive attacker answers to: the latest that he has an answer to."""
        known = self.attack.make().adapts if self.attack else ()
        return next((part for part in (self.finetune, self.align) if part and part.method in known), None)

    @property
    def adapts(self) -> bool:
        """Whether the attacker does other things than against an undefended model."""
        return self.attack is not None and self.attack.adaptive and (self.attack.tampers or self.defence is not None)

    def sections(self) -> list[Section]:
        return [part for part in (self.curate, self.align, self.attack, self.finetune) if part is not None]


@dataclass(frozen=True)
class Recipe:
    """A whole experiment, resolved."""

    name: str
    model: ModelConfig
    evaluate: EvalConfig
    base: Arm  # the top-level sections
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = (0,)
    allow_same_harmful: bool = False  # whether the defence may know the attacker's rows
    allow_contradicting_rows: bool = False  # whether answers may be of another kind than their role says
    expected: tuple[Expected, ...] = ()  # what a paper reports of these arms
    cost: str | None = None  # what the paper says that it costs, in words

    @classmethod
    def parse(cls, mapping: Mapping[str, Any]) -> Recipe:
        """Check and resolve a recipe as it stands in YAML; ConfigError names the key that does not fit."""
        known = ("name", "model", "data", "evaluate", *SECTIONS, "arms", "seeds", "allow_same_harmful",
                 "allow_contradicting_rows", "expected", "cost")  # fmt: skip
        for key in mapping:
            if key not in known:
                raise unknown_key(str(key), known)
        model = mapping.get("model", "lab")
        seeds = mapping.get("seeds", [0])
        parts = {"data": {}, "curate": None, "align": {}, "attack": None, "finetune": {}}
        parts |= {key: mapping[key] for key in parts if key in mapping}
        recipe = cls(
            name=convert(str, mapping.get("name", "run"), "name"),
            model=build(ModelConfig, {"path": model} if isinstance(model, str) else model, "model"),
            evaluate=_evaluate({} if mapping.get("evaluate") is None else mapping["evaluate"]),
            base=_arm("", parts, {}),
            arms=tuple(_arms(mapping.get("arms"), parts)),
            seeds=convert(tuple[int, ...], [seeds] if isinstance(seeds, int) else seeds, "seeds"),
            allow_same_harmful=convert(bool, mapping.get("allow_same_harmful", False), "allow_same_harmful"),
            allow_contradicting_rows=convert(bool, mapping.get("allow_contradicting_rows", False),
                                             "allow_contradicting_rows"),
            expected=convert(tuple[Expected, ...], mapping.get("expected") or [], "expected"),
            cost=convert(str | None, mapping.get("cost"), "cost"),
        )
        _check(recipe)
        return recipe

    def resolved(self) -> dict[str, Any]:
        """Every setting, defaults included, as JSON knows it."""
        full = to_dict(self)
        base = full.pop("base")
        base.pop("name")
        return {"name": full.pop("name"), "model": full.pop("model"), **base, **full}


def load_recipe(path: str | Path, overrides: Iterable[str] = (), lab: bool = False) -> Recipe:
    """The recipe in a YAML file, with `lab` on the embedded model (overlay.py), and `key.sub=value` options applied."""
    mapping = load_yaml(path)
    return Recipe.parse(override(on_lab(mapping) if lab else mapping, overrides))


def _evaluate(mapping: Any) -> EvalConfig:
    """The evaluation; without any suite the lab's held-out prompts, else the suites that are named and no other."""
    mapping = {key: value for key, value in _mapping(mapping, "evaluate").items() if value is not None}
    if any(name in mapping for name in SUITES):
        given = {name: mapping.get(name, []) for name in SUITES}
        mapping |= {name: value if isinstance(value, list) else [value] for name, value in given.items()}
    made = build(EvalConfig, mapping, "evaluate")
    made.check()
    return made


def _arms(mapping: Any, parts: Mapping[str, Any]) -> Iterable[Arm]:
    mapping = {"undefended": {}} if mapping is None else mapping
    if not isinstance(mapping, Mapping) or not mapping:
        raise ConfigError(
            f"'arms' is {mapping!r}, expected names with what differs: {{vaccine: {{align: {{method: vaccine}}}}}}"
        )
    for name, changes in mapping.items():
        if str(name) in RESERVED:
            raise ConfigError(f"arm '{name}' has a name of its own meaning; call it something else")
        yield _arm(str(name), parts, {} if changes is None else changes)


def _arm(name: str, parts: Mapping[str, Any], changes: Any) -> Arm:
    where = f"arms.{name}." if name else ""
    if not isinstance(changes, Mapping):
        raise ConfigError(f"'arms.{name}' is {changes!r}, expected a mapping such as {{align: {{method: vaccine}}}}")
    for key in changes:
        if key not in parts:
            raise unknown_key(str(key), parts, where.rstrip("."))
    sections = {
        key: _section(cls, _merge(cls, parts[key], changes[key]) if key in changes else parts[key], f"{where}{key}")
        for key, cls in SECTIONS.items()
    }
    if sections["attack"] and sections["finetune"]:
        sections["finetune"] = _attacked(sections["attack"], sections["finetune"], f"{where}attack")  # type: ignore
    data = {**_mapping(parts["data"], "data"), **_mapping(changes.get("data") or {}, f"{where}data")}
    sources = {str(role): DataSource.parse(spec) for role, spec in data.items() if spec is not None}
    return Arm(name, sources, **sections)  # type: ignore[arg-type]


def _attacked(attack: Attack, finetune: Finetune, where: str) -> Finetune:
    """The customer's training with what the attacker decides of it: this stands above what `finetune.train` says."""
    train = build(TrainConfig, {**to_dict(finetune.train), **attack.training()}, where)
    return replace(finetune, train=train)


def _merge(cls: type[Section], section: Any, change: Any) -> Any:
    """A section with an arm's changes; another method keeps only the section's own keys."""
    if change is None or not isinstance(section, Mapping) or not isinstance(change, Mapping):
        return change
    old, new = section.get("method", cls.default), change.get("method", section.get("method", cls.default))
    if old != new:
        section = {key: value for key, value in section.items() if key in _own(cls) and key != "p"}
    return _deep(section, change)


def _deep(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _deep(merged[key], value) if both else value
    return merged


def _own(cls: type[Section]) -> list[str]:
    return [item.name for item in fields(cls) if item.name != "fields"]


def _section(cls: type[Section], mapping: Any, where: str) -> Section | None:
    """A section from its mapping; null, or no mapping where there is no default, leaves it out."""
    if mapping is None:
        return None
    mapping = _mapping({"method": mapping} if isinstance(mapping, str) else mapping, where)
    name = convert(str, mapping.get("method", cls.default or ""), f"{where}.method")
    if not name:
        raise ConfigError(f"'{where}.method' is missing; see `apothecary methods` for the {cls.kind} methods")
    method = lookup(cls.kind, name)
    hyper = {item.name: item for item in fields(method)}
    own = set(_own(cls)) - ({"p"} if "p" not in hyper else set())
    given = {key: value for key, value in mapping.items() if key not in own}
    for key in given:
        if key not in hyper:
            raise unknown_key(str(key), own | set(hyper), where)
    options = {key: value for key, value in mapping.items() if key in own and key not in ("method", "p")}
    if "p" in own:
        options["p"] = _shares(mapping.get("p", hyper["p"].default), where)
    section = build(cls, {**options, "method": name, "fields": to_dict(build(method, given, where))}, where)
    for p in getattr(section, "p", None) or ():
        section.make(p=p)
    return section


def _shares(value: Any, where: str) -> list[float]:
    if value is MISSING:
        raise ConfigError(f"'{where}.p' is missing, expected a share of harmful rows in [0, 1]; add it")
    shares = convert(list[float], value if isinstance(value, (list, tuple)) else [value], f"{where}.p")
    for p in shares:
        if not 0 <= p <= 1:
            raise ConfigError(f"'{where}.p' is {p}, expected a share of harmful rows in [0, 1]; 10 % is 0.1")
    if not shares:
        raise ConfigError(f"'{where}.p' is empty, expected at least one share in [0, 1]")
    return list(dict.fromkeys(shares))


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"'{where}' is {value!r}, expected a mapping of keys to values")
    return value


def _check(recipe: Recipe) -> None:
    """What spans several sections: roles that methods need, adapters that fit, seeds."""
    if not recipe.seeds or len(set(recipe.seeds)) != len(recipe.seeds):
        raise ConfigError(f"'seeds' is {list(recipe.seeds)}, expected one or more different integers")
    own = [section.seed for arm in (recipe.base, *recipe.arms) for section in arm.sections()]
    for seed in (*recipe.seeds, *own):
        if seed is not None and not 0 <= seed < 2**32:
            raise ConfigError(f"a seed is {seed}, expected an integer from 0 to 4294967295; correct it in the recipe")
    for arm in (recipe.base, *recipe.arms):
        known = {role for section in arm.sections() for role in section.roles} | set(ROLES) - {"prompt"}
        for role in arm.data:
            if role not in known:
                raise unknown_key(role, known, "data")
    for arm in recipe.arms:
        _check_arm(recipe, arm)
    check_expected(recipe.expected, [arm.name for arm in recipe.arms])


def _check_arm(recipe: Recipe, arm: Arm) -> None:
    for section in arm.sections():
        own = {"curate": ("align",), "align": ("align",), "finetune": ("customer",), "attack": ()}[section.kind]
        for role in (*own, *section.roles):
            if role not in arm.data:
                raise ConfigError(
                    f"arm '{arm.name}': {section.kind} method '{section.method}' needs data role '{role}', which the "
                    f"recipe lacks; add '{role}: SOURCE' under data"
                )
        made = section.make()
        try:
            if isinstance(section, Curate):
                made.check(section.keep)
            elif isinstance(section, (Align, Finetune)):
                made.check(section.train, recipe.model)
        except ConfigError as error:
            raise ConfigError(f"arm '{arm.name}': {error}") from error
    if arm.attack:
        _check_attack(recipe, arm, arm.attack)
    if arm.curate and not 0 < arm.curate.keep <= 1:
        raise ConfigError(f"arm '{arm.name}': curate.keep is {arm.curate.keep}, expected a share in (0, 1]")
    if arm.finetune and arm.finetune.adapter == "single":
        both = (arm.align, arm.finetune)
        if any(part is None or part.train.parameters != "lora" for part in both):
            raise ConfigError(
                f"arm '{arm.name}': adapter: single goes on training the alignment's LoRA adapter, so align and "
                "finetune need train.parameters: lora; set both, or choose adapter: merged"
            )
        if arm.align and arm.align.train.lora != arm.finetune.train.lora:
            raise ConfigError(f"arm '{arm.name}': adapter: single has one adapter, but the lora settings of align and "
                              "finetune differ; make them equal")  # fmt: skip
    if recipe.allow_same_harmful or not arm.attack:
        return
    attack = arm.data.get("attack")
    if attack and attack == arm.data.get("harmful") and defends_with_harmful(arm):
        raise ConfigError(
            f"arm '{arm.name}': the defence's harmful rows and the attacker's are both '{attack.path}', so the defence "
            "would know the attack; name another source, or set allow_same_harmful: true (shown with every result)"
        )


def _check_attack(recipe: Recipe, arm: Arm, attack: Attack) -> None:
    made = attack.make()
    if attack.tampers:
        if recipe.model.quantization:
            raise ConfigError(f"arm '{arm.name}': {attack.method} edits weights, and {recipe.model.quantization} ones "
                              "cannot be edited; set quantization: null")  # fmt: skip
        return
    if not attack.adaptive:
        return
    defences = [part.method for part in (arm.align, arm.finetune) if part and part.method != "sft"]
    if defences and arm.defence is None:
        raise ConfigError(
            f"arm '{arm.name}': attack '{attack.method}' has no adaptive variant against {' and '.join(defences)}, "
            f"expected one of {', '.join(made.adapts) or 'none'}; set attack.adaptive: false, or choose another attack"
        )


def defends_with_harmful(arm: Arm) -> bool:
    """Whether a defence of this arm learns from harmful rows."""
    return any("harmful" in section.roles for section in arm.sections() if section.kind != "attack")
