"""From the studies of a sweep to the content of sweep.json."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from apothecary.config import to_dict
from apothecary.pipeline import fingerprint
from apothecary.pipeline.store import now
from apothecary.sweep import headline
from apothecary.sweep.config import Guard
from apothecary.sweep.guard import capability
from apothecary.sweep.recipe import SweepRecipe
from apothecary.sweep.records import Study
from apothecary.sweep.results import SCHEMA, together, trial_entry
from apothecary.sweep.trial import Found

REFERENCES = ("clean", "default")


def default_attack(guard: Guard, study: Study) -> Found | None:
    """The default attack with the guard's verdict; None while it or the clean customer is not known."""
    default, clean = study.note("default"), study.note("clean")
    if not default or not clean:
        return None
    if default["state"] != "complete":
        return default
    return {**default, "capability": to_dict(capability(guard, default["scores"], clean["scores"]))}


def worst(guard: Guard, study: Study) -> int | str | None:
    """The number of an arm's worst trial so far, "default", or None (headline.worst)."""
    return headline.worst(study.trials, default_attack(guard, study))


def arm_entry(recipe: SweepRecipe, name: str, study: Study, services: dict[str, str]) -> dict[str, Any]:
    """An arm as sweep.json holds it."""
    guard, clean, held = recipe.config.guard, study.note("clean"), study.note("held_out") or {}
    default, found = default_attack(guard, study), worst(guard, study)
    finished = [trial for trial in study.trials if trial.finished]
    unbroken = study.trials[: next((trial.number for trial in study.trials if not trial.finished), len(study.trials))]
    return {
        "arm": name, "budget": recipe.budget, "services": services,
        "methods": {part.kind: part.method for part in recipe.arm(name).sections()},
        "clean": clean, "default": default, "worst": found, "counts": headline.counts(study.trials),
        "curve": headline.best_so_far(unbroken, default), "trials": [trial_entry(each) for each in study.trials],
        "importance": headline.importance(finished),
        "guard": capability(guard, clean["scores"], clean["scores"]).asked if clean else [],
        "held_out": {**{key: held.get(key) for key in ("aligned", *REFERENCES)}, "trial": held.get(f"trial {found}"),
                     "worst": headline.worst_held_out(found, held, default)},
    }  # fmt: skip


def _complete(arm: dict[str, Any]) -> bool:
    """Whether all trials are done and the worst case, if there is one, has been held out."""
    counts = arm["counts"]
    done = counts["trials"] >= arm["budget"]["trials"] and not counts["running"]
    return done and (arm["worst"] is None or arm["held_out"]["worst"] is not None)


def collect(recipe: SweepRecipe, arms: Sequence[dict[str, Any]], store: Path, folder: Path) -> dict[str, Any]:
    """The content of sweep.json; ConfigError where the arms were searched with different budgets."""
    found = together(arms, recipe.config.allow_mixed_budgets)
    return {
        "kind": "sweep", "schema": SCHEMA, "name": recipe.recipe.name, "created": now(),
        "complete": all(map(_complete, arms)),
        "versions": {**fingerprint.versions(), "optuna": version("optuna")},
        "store": os.path.relpath(store.resolve(), folder.resolve()),
        "measure": recipe.measure, "recipe": recipe.resolved(), **found,
    }  # fmt: skip
