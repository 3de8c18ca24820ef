"""sweep.json: every trial, the headline of each arm, the budget and every setting; and putting several together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apothecary.errors import ConfigError, StoreError
from apothecary.pipeline.store import write_atomic, writing
from apothecary.sweep import headline
from apothecary.sweep.experiment import differing

SWEEP = "sweep.json"
SCHEMA = 3
ARM = ("arm", "budget", "experiment", "methods", "clean", "default", "worst", "not_shown", "counts", "curve", "trials",
       "guard", "held_out")  # fmt: skip
WHOLE = ("name", "created", "complete", "seconds", "versions", "store", "measure", "recipe", "mixed_budgets",
         "comparisons")  # fmt: skip
PAIRED = ("held_out", "evaluate", "measure")  # without the same prompts and judge there are no pairs to test


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has found: `results` is the content of sweep.json, `folder` where it lies."""

    results: dict[str, Any]
    folder: Path

    def save(self) -> Path:
        """Write sweep.json, in one step."""
        path = self.folder / SWEEP
        with writing("the sweep's results", self.folder):
            write_atomic(path, json.dumps(self.results, indent=1, ensure_ascii=False) + "\n")
        return path

    def arm(self, name: str) -> dict[str, Any]:
        """The entry of an arm."""
        return next(arm for arm in self.results["arms"] if arm["arm"] == name)


def is_sweep(path: Path) -> bool:
    """Whether a folder, or a file of any name, holds the result of a sweep."""
    if path.is_dir():
        return (path / SWEEP).exists()
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return path.name == SWEEP
    return path.name == SWEEP or (isinstance(found, dict) and found.get("kind") == "sweep")


def load_sweep_result(folder: str | Path) -> SweepResult:
    """The result of an earlier sweep, from its folder or its sweep.json; StoreError if there is none."""
    path = Path(folder)
    path = path / SWEEP if path.is_dir() else path
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise StoreError(f"{path} cannot be read as a sweep ({reason}); give the folder of a sweep") from error
    if not isinstance(found, dict) or found.get("kind") != "sweep" or found.get("schema") != SCHEMA:
        raise StoreError(f"{path} is no sweep.json of this version (schema {SCHEMA}); give the folder of a sweep")
    if lacking := _lacking(found):
        raise StoreError(f"{path} is no whole sweep.json ({lacking}); give the folder of a sweep")
    return SweepResult(found, path.parent)


def _lacking(found: Mapping[str, Any]) -> str:
    """What a page cannot do without and is not there, in words; empty where all is."""
    arms = found.get("arms")
    if not isinstance(arms, list) or not arms or not all(isinstance(arm, dict) for arm in arms):
        return "it lists no arms"
    if absent := [name for name in WHOLE if name not in found]:
        return f"it lacks {', '.join(absent)}"
    for number, arm in enumerate(arms, 1):
        if absent := [name for name in ARM if name not in arm]:
            return f"arm {number} lacks {', '.join(absent)}"
        if wrong := [name for name in ("budget", "counts", "held_out") if not isinstance(arm[name], dict)]:
            return f"in arm {number} {', '.join(wrong)} cannot be read"
        if not isinstance(arm["trials"], list) or not all(isinstance(trial, dict) for trial in arm["trials"]):
            return f"in arm {number} the trials cannot be read"
    return ""


def trial_entry(trial: Any) -> dict[str, Any]:
    """A trial as sweep.json holds it."""
    found = trial.found
    scores, cost = found.get("scores") or {}, found.get("costs") or {}
    return {
        "number": trial.number, "settings": trial.settings, "state": trial.state, "attempts": trial.attempts,
        "reason": found.get("reason"), "uncovered": found.get("uncovered"), "harm": found.get("harm"),
        "capability": found.get("capability"),
        "flagged": _score(scores, "flagged"), "HS": _score(scores, "HS"), "HS+": _score(scores, "HS+"),
        "task": (scores.get("task") or {}).get("accuracy"), "drift": (scores.get("drift") or {}).get("loss"),
        "kl": (scores.get("drift") or {}).get("kl"), "seconds": cost.get("seconds"),
        "cpu_seconds": cost.get("cpu_seconds"), "peak_memory_mb": cost.get("peak_memory_mb"),
        "look": found.get("look"), "keys": found.get("keys"),
    }  # fmt: skip


def _score(scores: Mapping[str, Any], name: str) -> float | None:
    return (scores.get("triggered") or scores.get("harmful") or {}).get(name)


def merged(results: Sequence[dict[str, Any]], allow_mixed_budgets: bool = False) -> dict[str, Any]:
    """One result with the arms of several sweeps; ConfigError where an arm is in two, or budgets or experiments differ.

    With `allow_mixed_budgets` they are put together all the same, and every page says so.
    """
    arms: dict[str, dict[str, Any]] = {}
    for result in results:
        for arm in result["arms"]:
            if arm["arm"] in arms:
                raise ConfigError(f"arm '{arm['arm']}' is in two of the sweeps, expected each arm once; rename one")
            arms[arm["arm"]] = arm
    spent: list[Any] = [each.get("seconds") for each in results]
    return {**results[0], "complete": all(each["complete"] for each in results),
            "seconds": None if None in spent else sum(spent),
            **together(list(arms.values()), allow_mixed_budgets)}  # fmt: skip


def together(arms: Sequence[dict[str, Any]], allow_mixed_budgets: bool) -> dict[str, Any]:
    """The arms with what compares them: paired tests of their worst cases, once all that can be told are held out."""
    mixed = check_comparable(arms, allow_mixed_budgets)
    told = [arm for arm in arms if not arm.get("not_shown")]
    held = [{"arm": arm["arm"], **arm["held_out"]["worst"]} for arm in told if arm["held_out"].get("worst")]
    paired = told and told[0] is arms[0] and len(held) == len(told) and not set(mixed) & set(PAIRED)
    return {"mixed_budgets": mixed, "arms": list(arms), "comparisons": headline.compare(held) if paired else []}


def check_comparable(arms: Sequence[Mapping[str, Any]], allow_mixed_budgets: bool) -> list[str]:
    """The parts in which the arms' budgets or experiments differ; ConfigError if there are any, unless allowed."""
    found = {
        "the arms were searched with different budgets": differing([arm["budget"] for arm in arms]),
        "the arms are of different experiments": differing([arm.get("experiment") or {} for arm in arms]),
    }
    for said, parts in found.items():
        if parts and not allow_mixed_budgets:
            raise ConfigError(
                f"{said} ({', '.join(parts)}), so their worst cases cannot be compared; make these parts equal, or set "
                "allow_mixed_budgets: true (the page says so)"
            )
    return [part for parts in found.values() for part in parts]
