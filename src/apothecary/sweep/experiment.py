"""What two arms must share, beside the budget, for their worst cases to be compared: everything but the defence.

The defence is how rows for alignment are selected, how the model is aligned, the method that trains on the customer's
rows, and the rows that such methods need for themselves; in these arms differ, for that is what is compared.
"""

from __future__ import annotations

from typing import Any

from apothecary.config import to_dict
from apothecary.pipeline import fingerprint
from apothecary.pipeline.plan import Planned
from apothecary.sweep.recipe import DEFENDERS, SweepRecipe

SHARED_DATA = ("align", "customer", "general", "attack")  # roles that are no method's own
TRAINER = ("apothecary.train.fit",)  # what every training goes through
SHARED_STAGES = ("attack", "evaluate")  # stages that run the same code whatever the defence


def experiment(recipe: SweepRecipe, name: str, default: Planned) -> dict[str, Any]:
    """The parts by name, as JSON knows them; `default` is the arm's default attack, planned."""
    arm = recipe.arm(name)
    training = to_dict(arm.finetune.train) if arm.finetune else None
    for key in DEFENDERS if training else ():
        training.pop(key.rpartition(".")[2], None)  # type: ignore[union-attr]
    code = {stage.kind: stage.source for stage in default.evaluation.lineage() if stage.kind in SHARED_STAGES}
    return {
        "model": to_dict(recipe.recipe.model),
        "data": {role: to_dict(source) for role, source in sorted(arm.data.items()) if role in SHARED_DATA},
        "attack": to_dict(arm.attack) if arm.attack else None,
        "training": training,
        "clean": recipe.clean(name),
        "seeds": list(recipe.recipe.seeds),
        "code": {**code, "training": fingerprint.source_digest(TRAINER), **fingerprint.key_versions()},
    }


def differing(values: list[dict[str, Any]]) -> list[str]:
    """Names of the parts that are not the same in all, sorted; a part that is missing in one is another."""
    absent = object()
    names = {name for value in values for name in value}
    return sorted(name for name in names if any(
        value.get(name, absent) != values[0].get(name, absent) for value in values))  # fmt: skip
