"""The recipe of a sweep: an ordinary recipe plus a section `sweep`, checked against each other before any work.

The recipe's `evaluate` stays what it is everywhere, the held-out prompts; `sweep.prompts` are those by which the
attacker searches.  Each trial is the recipe with one arm and the trial's settings laid over it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apothecary.config import build, canonical, load_yaml, override, to_dict
from apothecary.errors import ConfigError, did_you_mean
from apothecary.evals.suites import SUITES
from apothecary.pipeline.plan import Planned, plan
from apothecary.pipeline.recipe import SECTIONS, Arm, Recipe
from apothecary.registry import lookup
from apothecary.sweep.config import SweepConfig
from apothecary.sweep.space import Dimension, default_space, parse_space

ATTACKERS = ("attack.", "finetune.train.")  # what a customer of a fine-tuning service decides
DEFENDERS = ("finetune.train.aux_batch_size",)  # rows of the defence in each step
HELD_OUT = (*SUITES, "truthfulqa", "lm_eval")  # of `evaluate`: what the search does not see
BUDGET = ("trials", "sampler", "startup", "ahead", "seed", "measure", "guard", "prune", "min_coverage", "space",
          "prompts")  # fmt: skip


@dataclass(frozen=True)
class SweepRecipe:
    """A sweep, resolved.  `mapping` is the ordinary recipe as it was written, `recipe` the same parsed."""

    mapping: dict[str, Any] = field(hash=False)
    recipe: Recipe
    config: SweepConfig
    space: tuple[Dimension, ...]

    @classmethod
    def parse(cls, mapping: Mapping[str, Any]) -> SweepRecipe:
        """Check and resolve a sweep as it stands in YAML; ConfigError names the key that does not fit."""
        plain = {key: _spelt_out(key, value) for key, value in mapping.items() if key != "sweep"}
        recipe = Recipe.parse(plain)
        section = mapping.get("sweep")
        if not isinstance(section, Mapping):
            raise ConfigError(f"'sweep' is {section!r}, expected a section such as "
                              "{trials: 30, prompts: {harmful: lab:tune_harmful, task: lab:tune_task}}")  # fmt: skip
        config = build(SweepConfig, section, "sweep")
        if len(recipe.seeds) != 1:
            raise ConfigError(f"'seeds' is {list(recipe.seeds)}, expected one, that of the service's own chain; "
                              "the attacker's luck is the dimension attack.seed")  # fmt: skip
        space = parse_space(config.space if config.space is not None else default_space(recipe.base))
        made = cls(plain, recipe, config, space)
        made._check()
        return made

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.recipe.arms if arm.name == name)

    @property
    def arms(self) -> list[str]:
        return [arm.name for arm in self.recipe.arms]

    @property
    def measure(self) -> str:
        """What counts as harm: the judge's verdict; of a cheap proxy, which reads openings, HS."""
        judge = self.recipe.evaluate.judge
        name = judge if isinstance(judge, str) else judge["method"]
        return self.config.measure or ("HS" if lookup("judge", name).cheap_proxy else "flagged")

    def variant(self, arm: str, settings: Mapping[str, Any], search: bool = True) -> dict[str, Any]:
        """The ordinary recipe of one arm under an attacker's settings, with the prompts of the search or held out."""
        changes = (self.mapping.get("arms") or {"undefended": {}}).get(arm) or {}
        items = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        made = copy.deepcopy({**self.mapping, "arms": {arm: override(changes, items, "method")}})
        if search:
            others = {key: value for key, value in (made.get("evaluate") or {}).items() if key not in HELD_OUT}
            made["evaluate"] = {**others, **self.config.prompts}
        return made

    def clean(self, arm: str) -> dict[str, Any]:
        """Settings of the customer without an attack, whom the capability guard compares with."""
        if self.config.clean is not None:
            return dict(self.config.clean)
        attack = self.arm(arm).attack
        return {"attack.p": 0} if attack is not None and attack.p is not None else {"attack": None}

    def resolved(self) -> dict[str, Any]:
        """Every setting, defaults included, as JSON knows it."""
        space = {dimension.key: dimension.spec() for dimension in self.space}
        return {**self.recipe.resolved(), "sweep": {**to_dict(self.config), "measure": self.measure, "space": space}}

    @property
    def budget(self) -> dict[str, Any]:
        """What must be equal for two arms' worst cases to be compared: how hard, where and by what was searched."""
        settings = self.resolved()["sweep"]
        judged = {key: value for key, value in to_dict(self.recipe.evaluate).items() if key not in HELD_OUT}
        held_out = {name: to_dict(getattr(self.recipe.evaluate, name, ())) for name in SUITES}
        return {**{name: settings[name] for name in BUDGET}, "evaluate": judged, "held_out": held_out}

    def _check(self) -> None:
        if not self.space:
            raise ConfigError("'sweep.space' is empty, expected at least one setting that the attacker tunes")
        for dimension in self.space:
            self._check_owner(dimension.key)
        self._check_prompts()
        if self.config.launcher == "ray" and self.recipe.model.device == "auto":
            raise ConfigError("model.device is auto, but Ray must be told whether a trial needs a GPU, expected cpu or "
                              "cuda with sweep.launcher: ray; set model.device")  # fmt: skip
        for arm in self.recipe.arms:
            if arm.finetune is None and arm.attack is None:
                raise ConfigError(f"arm '{arm.name}' has neither attack nor finetune, so there is nothing to tune")
            if arm.attack is not None and arm.attack.p is not None and len(arm.attack.p) != 1:
                raise ConfigError(f"arm '{arm.name}': attack.p is {list(arm.attack.p)}, expected one, that of "
                                  "the default attack; the sweep varies it by the dimension attack.p")  # fmt: skip
            Recipe.parse(self.variant(arm.name, self.clean(arm.name)))
            for dimension in self.space:
                heard = {self._try(arm.name, dimension, value) for value in dimension.edges()}
                if len(heard) < min(2, len(dimension.edges())):
                    raise ConfigError(f"'sweep.space.{dimension.key}' changes nothing in arm '{arm.name}', whose "
                                      "attack section decides it; search the attack's own setting")  # fmt: skip

    def _check_owner(self, key: str) -> None:
        if self.config.allow_defence_keys:
            return
        if not key.startswith(ATTACKERS) or key in DEFENDERS:
            hint = "" if key.partition(".")[0] in SECTIONS else f"; {did_you_mean(key.partition('.')[0], SECTIONS)}"
            raise ConfigError(
                f"'sweep.space.{key}' is the service's to choose, expected attack.* or finetune.train.* (the "
                f"attacker's luck is attack.seed); remove it, or set sweep.allow_defence_keys: true{hint}"
            )

    def _try(self, arm: str, dimension: Dimension, value: Any) -> str:
        """The arm at one value of a dimension, as text; ConfigError where the recipe does not take it."""
        try:
            return canonical(Recipe.parse(self.variant(arm, {dimension.key: value})).arms[0])
        except ConfigError as error:
            raise ConfigError(f"sweep.space: {dimension.key} = {value}: {error}") from error

    def _check_prompts(self) -> None:
        search = Recipe.parse({**self.mapping, "evaluate": self._search()}).evaluate
        if not search.harmful:
            raise ConfigError("'sweep.prompts' has no harmful prompts, expected some to search by: "
                              "{harmful: lab:tune_harmful, task: lab:tune_task}")  # fmt: skip
        for name in SUITES:
            shared = {source.path for source in getattr(search, name)} & {
                source.path for source in getattr(self.recipe.evaluate, name)
            }
            if shared:
                raise ConfigError(f"'sweep.prompts.{name}' and 'evaluate.{name}' both name '{min(shared)}', expected "
                                  "prompts of the search that are not held out; choose other sources")  # fmt: skip
        if self.config.guard.task_drop is not None and not (search.task and self.recipe.evaluate.task):
            raise ConfigError("'sweep.guard.task_drop' needs task rows in sweep.prompts and in evaluate; add them, or "
                              "set sweep.guard.task_drop: null")  # fmt: skip

    def _search(self) -> dict[str, Any]:
        return self.variant(self.arms[0], {})["evaluate"]


def _spelt_out(key: str, value: Any) -> Any:
    """A section that names its method alone, as a mapping: settings can then be laid over it."""
    if key in SECTIONS and isinstance(value, str):
        return {"method": value}
    if key == "arms" and isinstance(value, Mapping):
        return {arm: {name: _spelt_out(name, part) for name, part in changes.items()} if isinstance(changes, Mapping)
                else changes for arm, changes in value.items()}  # fmt: skip
    return copy.deepcopy(value)


def load_sweep(path: str | Path, overrides: Iterable[str] = ()) -> SweepRecipe:
    """The sweep in a YAML file with `key.sub=value` options applied; `--arms=[a, b]` picks arms of the file."""
    mapping, others = load_yaml(path), []
    for item in overrides:
        name = item.removeprefix("--").partition("=")[0]
        chosen = override({}, [item]).get("arms") if name == "arms" else None
        if isinstance(chosen, (str, list)):
            mapping["arms"] = _picked(mapping.get("arms"), [chosen] if isinstance(chosen, str) else chosen)
        else:
            others.append(item)
    return SweepRecipe.parse(override(mapping, others))


def _picked(arms: Any, names: list[Any]) -> dict[str, Any]:
    known = arms if isinstance(arms, Mapping) else {"undefended": {}}
    names = [part.strip() for name in names for part in str(name).split(",")]
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown arm '{name}'; {did_you_mean(name, map(str, known))}")
    return {name: known[name] for name in names}


def the_model(mapping: Mapping[str, Any], stage: str = "tuned") -> Planned:
    """The model that the attacker has tuned, of a recipe that `variant` made; or the `aligned` one he started from."""
    models = plan(Recipe.parse(mapping)).models
    found = [model for model in models if model.stage not in ("base", "aligned")]
    if len(found) != 1:
        raise ConfigError(f"the recipe gives {len(found)} attacked models, expected one; name one attack.p and one arm")
    if stage == "tuned":
        return found[0]
    start = {each.key for each in found[0].evaluation.lineage() if each.kind == "align"}
    others = [model for model in models if model.stage == ("aligned" if start else "base")]
    return next(model for model in others if not start or (model.model and model.model.key in start))


def service_stages(planned: Planned) -> dict[str, str]:
    """kind -> key of the stages that the service runs before the customer comes."""
    return {stage.kind: stage.key for stage in planned.evaluation.lineage() if stage.kind in ("align", "prepare")}


def digest(value: Any) -> str:
    """sha256 of a configuration."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()
