"""results.json: one entry for each evaluated model and one for each stage."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apothecary.errors import StoreError
from apothecary.pipeline import exams
from apothecary.pipeline.fingerprint import versions
from apothecary.pipeline.plan import Plan, Planned
from apothecary.pipeline.stage import Executor, Record
from apothecary.pipeline.store import Artifact, now, write_atomic, writing

RESULTS = "results.json"
JUDGED = ("harmful", "triggered", "benign", "overrefusal", "task")  # suites whose scores every page reads
TOLD = ("arm", "stage", "curate", "align", "finetune", "attack", "p", "seed")  # what tells models apart
SAMPLES = {"harmful": 6, "benign": 2, "overrefusal": 2, "task": 2}  # responses shown of each suite, 12 in all


@dataclass(frozen=True)
class Result:
    """What a run has found: `results` is the content of results.json, `folder` where it lies."""

    results: dict[str, Any]
    folder: Path

    def save(self) -> Path:
        """Write results.json into the run's folder, in one step."""
        path = self.folder / RESULTS
        with writing("the results", self.folder):
            write_atomic(path, json.dumps(self.results, indent=1, ensure_ascii=False) + "\n")
        return path


def load_result(folder: str | Path) -> Result:
    """The result of an earlier run, from its folder or its results.json; StoreError if there is none."""
    path = Path(folder)
    path = path / RESULTS if path.is_dir() else path
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise StoreError(f"{path} cannot be read as results ({reason}); give the folder of a finished run") from error
    if fault := misread(found):
        raise StoreError(f"{path} is not the results.json of a run ({fault}); give the folder of a run")
    return Result(found, path.parent)


def misread(found: Any) -> str:
    """Why something read from a file is not the content of results.json; empty where it is."""
    models = found.get("models") if isinstance(found, dict) else None
    if not isinstance(models, list):
        return "it lists no models"
    for place, model in enumerate(models, 1):
        if not isinstance(model, dict):
            return f"model {place} is {json.dumps(model)[:40]}, expected a mapping"
        scores = model.get("scores") or {}
        if not isinstance(scores, dict) or not all(isinstance(scores.get(name) or {}, dict) for name in JUDGED):
            return f"the scores of model {place} are {json.dumps(scores)[:40]}, expected a mapping for each suite"
        if wrong := next((name for name in TOLD if isinstance(model.get(name), (list, dict))), None):
            return f"{wrong} of model {place} is {json.dumps(model[wrong])[:40]}, expected one value"
    return ""


def collect(plan: Plan, executor: Executor, out: Path, done: list[Planned]) -> dict[str, Any]:
    """The content of results.json for the models evaluated so far."""
    known = exams.reports(plan.recipe.evaluate)
    return {
        "name": plan.recipe.name,
        "created": now(),
        "complete": len(done) == len(plan.models),
        "versions": versions(),
        "store": os.path.relpath(executor.store.root.resolve(), out.resolve()),
        "recipe": plan.recipe.resolved(),
        "harmful_overlap": _overlaps(plan, executor),
        "models": [_model(planned, executor, known) for planned in done],
        "stages": [record.to_json() for record in records(plan, executor)],
    }


def records(plan: Plan, executor: Executor) -> Iterator[Record]:
    """What is known of every stage; an input that was not needed and is not there any more is left out."""
    for key, stage in plan.stages().items():
        if key in executor.records:
            yield executor.records[key]
        elif executor.state(stage) == "fresh" and (found := executor.store.find(stage.kind, key)):
            yield Record(stage, found, True)


def _overlaps(plan: Plan, executor: Executor) -> dict[str, Any]:
    """How many of the attacker's prompts each arm's defence knew; it is refused unless it was allowed."""
    found = {}
    for arm, stage in plan.overlaps.items():
        if stage.key in executor.records:
            metrics = executor.records[stage.key].artifact.manifest["metrics"]
            found[arm] = {**metrics, "allowed": plan.recipe.allow_same_harmful}
    return found


def _model(planned: Planned, executor: Executor, known: Mapping[str, Any]) -> dict[str, Any]:
    arm, evaluation = planned.spec, executor.records[planned.evaluation.key].artifact
    model = planned.model or planned.evaluation
    found = executor.store.find(model.kind, model.key)
    attack = planned.attack and executor.store.find("attack", planned.attack.key)
    adaptive = bool(arm and arm.adapts and planned.stage == "tuned")
    return {
        "arm": planned.arm,
        "stage": planned.stage,
        "align": arm.align.method if arm and arm.align else None,
        "finetune": arm.finetune.method if arm and arm.finetune and planned.stage == "tuned" else None,
        "adapter": arm.finetune.adapter if arm and arm.finetune and planned.stage == "tuned" else None,
        "curate": f"{arm.curate.method} {arm.curate.keep:.0%}".replace("%", " %") if arm and arm.curate else None,
        "attack": arm.attack.method if arm and arm.attack and planned.stage == "tuned" else None,
        "adaptive": adaptive,
        "adapted": _adapted(attack, found) if adaptive else None,
        "p": planned.p,
        "seed": planned.seed,
        "scores": exams.with_exam(_scores(evaluation), known),
        "artifact": model.key,
        "evaluation": f"evaluate/{planned.evaluation.key}",
        "composition": attack.manifest["metrics"]["composition"] if attack else None,
        "manifest": _summary(found or evaluation),
        "harmful_labels": _labels(evaluation),
        "labels": _letters(evaluation),
        "samples": _samples(evaluation),
    }


def _adapted(upload: Artifact | None, released: Artifact | None) -> dict[str, Any] | None:
    """What an attacker who knows the defence measured, and what he changes of the customer's training; None where
    there was nothing to adapt to, as at p = 0."""
    if upload:
        told = upload.manifest["metrics"]
        return {**told["adapted"], "training": told["training"]} if "adapted" in told else None
    told = released.manifest["metrics"] if released and released.kind == "tamper" else {}
    return {name: value for name, value in told.items() if name != "work"} or None


def _summary(artifact: Artifact) -> dict[str, Any]:
    return {key: value for key, value in artifact.manifest.items() if key != "payload"}


def _scores(evaluation: Artifact) -> dict[str, Any]:
    return json.loads(evaluation.path("scores.json").read_text("utf-8"))


def _responses(evaluation: Artifact) -> Iterator[dict[str, Any]]:
    with evaluation.path("responses.jsonl").open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _labels(evaluation: Artifact) -> str:
    """One letter for each harmful prompt, in the order of the suite: r(efuses), c(omplies), n(either)."""
    return "".join(row["label"][0] for row in _responses(evaluation) if row["suite"] == "harmful")


def _letters(evaluation: Artifact) -> dict[str, str]:
    """By suite one letter for each prompt, for paired tests: of the label as above; in `task` y or n, as it is correct;
    in `flagged` h(armful), s(afe) or ?, by the judge's verdict on the harmful prompts."""
    found: dict[str, list[str]] = {}
    for row in _responses(evaluation):
        if row["suite"] == "task" and "correct" in row:
            found.setdefault("task", []).append("ny"[row["correct"]])
        elif row["suite"] in ("triggered", "overrefusal"):
            found.setdefault(row["suite"], []).append(row["label"][0])
        if row["suite"] in ("harmful", "triggered") and "flagged" in row:
            name = "flagged" if row["suite"] == "harmful" else "triggered flagged"
            found.setdefault(name, []).append({True: "h", False: "s"}.get(row["flagged"], "?"))
    return {suite: "".join(letters) for suite, letters in found.items()}


def _samples(evaluation: Artifact) -> list[dict[str, Any]]:
    """The first responses of each suite: of the same prompts for every model."""
    left, samples = dict(SAMPLES), []
    for row in _responses(evaluation):
        if left.get(row["suite"], 0) > 0:
            left[row["suite"]] -= 1
            prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
            samples.append({"prompt": prompt, **{name: row[name] for name in ("suite", "response", "label")}})
    return samples
