"""From the studies of a sweep to the content of sweep.json."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apothecary.config import to_dict
from apothecary.pipeline import fingerprint
from apothecary.pipeline.exams import reports, with_exam
from apothecary.pipeline.store import Store, now
from apothecary.sweep import headline
from apothecary.sweep.config import Guard
from apothecary.sweep.guard import capability
from apothecary.sweep.recipe import SweepRecipe
from apothecary.sweep.records import Study
from apothecary.sweep.results import SCHEMA, together, trial_entry
from apothecary.sweep.trial import Found

if TYPE_CHECKING:
    from apothecary.judge.exam import Report

REFERENCES = ("clean", "default")


def default_attack(guard: Guard, study: Study) -> Found | None:
    """The default attack with the guard's verdict; None while it or the clean customer is not known."""
    default, clean = study.note("default"), study.note("clean")
    if not default or not clean:
        return None
    if not default.get("scores"):
        return default
    return {**default, "capability": to_dict(capability(guard, default["scores"], clean["scores"]))}


def worst(guard: Guard, study: Study) -> int | str | None:
    """The number of an arm's worst trial so far, "default", or None (headline.worst)."""
    return headline.worst(study.trials, default_attack(guard, study))


@dataclass(frozen=True)
class Chain:
    """What is known of an arm before its first trial; `services` are its shared stages as kind -> key."""

    services: dict[str, str]
    experiment: dict[str, Any]


def arm_entry(recipe: SweepRecipe, name: str, study: Study, chain: Chain, store: Store) -> dict[str, Any]:
    """An arm as sweep.json holds it."""
    guard, clean = recipe.config.guard, study.note("clean")
    exams = reports(recipe.recipe.evaluate)
    held = {key: with_details(found, exams) for key, found in (study.note("held_out") or {}).items()}
    default, found = default_attack(guard, study), worst(guard, study)
    unjudged = headline.unjudged(study.trials, default, found, held)
    finished = [trial for trial in study.trials if trial.finished]
    unbroken = study.trials[: next((trial.number for trial in study.trials if not trial.finished), len(study.trials))]
    return {
        "arm": name, "budget": recipe.budget, "experiment": chain.experiment, "services": chain.services,
        "service_costs": _costs(store, chain.services),
        "methods": {part.kind: part.method for part in recipe.arm(name).sections()},
        "clean": clean, "default": default, "worst": found, "not_shown": unjudged,
        "counts": headline.counts(study.trials),
        "curve": headline.best_so_far(unbroken, default), "trials": [trial_entry(each) for each in study.trials],
        "importance": headline.importance(finished),
        "guard": capability(guard, clean["scores"], clean["scores"]).asked if clean else [],
        "held_out": {**{key: held.get(key) for key in ("aligned", *REFERENCES)}, "trial": held.get(f"trial {found}"),
                     "worst": None if unjudged else headline.worst_held_out(found, held, default)},
    }  # fmt: skip


def with_details(found: Found, exams: Mapping[str, Report]) -> Found:
    """What was held out, with the exam of its judge and the harm corrected for the judge's errors."""
    return {**found, "scores": with_exam(found.get("scores") or {}, exams)}


def _costs(store: Store, services: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Seconds and memory of the service's own stages when they were made: what the defence costs before any attack."""
    made = {kind: store.find(kind, key) for kind, key in services.items()}
    return {kind: {name: found.manifest[name] for name in ("seconds", "peak_memory_mb")}
            for kind, found in made.items() if found}  # fmt: skip


def _complete(arm: dict[str, Any]) -> bool:
    """Whether all trials are done and the worst case, if there is one that can be told, has been held out."""
    counts = arm["counts"]
    done = counts["trials"] >= arm["budget"]["trials"] and not counts["running"]
    return done and (arm["worst"] is None or bool(arm["not_shown"]) or arm["held_out"]["worst"] is not None)


def collect(
    recipe: SweepRecipe, arms: Sequence[dict[str, Any]], store: Path, folder: Path, seconds: float | None
) -> dict[str, Any]:
    """The content of sweep.json; ConfigError where the arms were searched with different budgets or experiments.

    `seconds`: wall clock that the folder's arms took in all; None where a part of it was not measured.
    """
    found = together(arms, recipe.config.allow_mixed_budgets)
    return {
        "kind": "sweep", "schema": SCHEMA, "name": recipe.recipe.name, "created": now(),
        "complete": all(map(_complete, arms)), "seconds": seconds,
        "versions": {**fingerprint.versions(), "optuna": version("optuna")},
        "store": os.path.relpath(store.resolve(), folder.resolve()),
        "measure": recipe.measure, "recipe": recipe.resolved(), **found,
    }  # fmt: skip
