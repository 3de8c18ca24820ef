"""Results of a recipe whose seeds were run apart, as one; and what of them is worth keeping in a repository."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from apothecary.errors import StoreError
from apothecary.pipeline.model_folder import without_places

Results = Mapping[str, Any]
MODEL = ("arm", "stage", "curate", "align", "attack", "finetune", "adapter", "p", "seed")  # what tells models apart
PARTS = ("by_category", "judges")  # scores within a suite's scores
KEPT = (*PARTS, "identity", "agreement", "exam")  # mappings of a suite's scores that follow from nothing else
ONE_LINE = ("models", "arms", "stages")  # lists with one entry on each line of the file


def combine(runs: Sequence[Results]) -> dict[str, Any]:
    """One results dictionary with the models and stages of all runs, in the order of the first.

    Raises StoreError for a run that is not complete, and for runs that differ in more than their seeds.
    """
    first = runs[0]
    for run in runs:
        if not run["complete"]:
            raise StoreError(f"a run of '{run['name']}' is not complete; finish it first")
        for part in ("versions", "recipe"):
            if (difference := _difference(_unseeded(first[part]), _unseeded(run[part]))) is not None:
                raise StoreError(f"runs of '{first['name']}' differ in {part}{difference}, expected runs that differ "
                                 "in their seeds alone; give those of one recipe and installation")  # fmt: skip
    models, stages = {}, {}
    for run in runs:
        for model in run["models"]:
            same = "any" if model["stage"] == "base" else model["seed"]
            models.setdefault((model["arm"], model["stage"], model["p"], same), model)
        stages |= {stage["key"]: stage for stage in run["stages"] if stage["key"] not in stages}
    seeds = sorted({seed for run in runs for seed in run["recipe"]["seeds"]})
    return {**first, "created": max(run["created"] for run in runs), "recipe": {**first["recipe"], "seeds": seeds},
            "models": list(models.values()), "stages": list(stages.values())}  # fmt: skip


def compact(results: Results) -> dict[str, Any]:
    """Settings, versions and scores without responses, and nothing of the host; `apothecary report` reads it too.

    An aligned model has `made`: the processor time of its alignment and its selection, and how the selector ranked a
    pool whose faults are known.
    """
    stages = {stage["key"]: stage for stage in results["stages"]}
    models = [{**{name: model.get(name) for name in MODEL}, **_made(model, stages),
               "scores": {suite: _numbers(scores) for suite, scores in model["scores"].items()},
               "harmful_labels": model.get("harmful_labels", ""), **_told(model, "labels"),
               **_told(model, "adapted")}
              for model in results["models"]]  # fmt: skip
    kept_of = {"prepare": ("kind", "key", "label", "metrics"), "data": ("kind", "key", "label", "digest")}
    prepared = [{name: stage[name] for name in kept_of[stage["kind"]] if name in stage}
                for stage in results["stages"] if stage["kind"] in kept_of]  # fmt: skip
    kept = {name: results[name] for name in ("name", "created", "complete", "versions")}
    return {**kept, "harmful_overlap": results.get("harmful_overlap", {}), "recipe": without_places(results["recipe"]),
            "models": models, "stages": prepared}  # fmt: skip


def _told(model: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name: model[name]} if model.get(name) else {}


def _made(model: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    if "made" in model or model["stage"] != "aligned" or model.get("artifact") not in stages:
        return {"made": model["made"]} if "made" in model else {}
    align = stages[model["artifact"]]
    made = {"align": {"cpu_seconds": align["cpu_seconds"]}}
    for stage in (stages[key] for key in align["inputs"] if key in stages):
        if stage["kind"] == "curate":
            told = {name: stage["metrics"][name] for name in ("rows", "pool", "ranking") if name in stage["metrics"]}
            made["curate"] = {"cpu_seconds": stage["cpu_seconds"], **told}
    return {"made": made}


def text(results: Results) -> str:
    """JSON with one line for each model, arm and stage: a changed score is a changed line."""
    return _text(results, 0) + "\n"


def _text(value: Any, depth: int, name: str = "") -> str:
    inner = " " * (depth + 1)
    if name in ONE_LINE and value:
        lines = [inner + json.dumps(entry, ensure_ascii=False) for entry in value]
        return "[\n" + ",\n".join(lines) + f"\n{' ' * depth}]"
    if isinstance(value, Mapping) and depth < 2 and value:
        lines = [f"{inner}{json.dumps(key)}: {_text(part, depth + 1, key)}" for key, part in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{' ' * depth}}}"
    return json.dumps(value, ensure_ascii=False)


def _numbers(scores: Mapping[str, Any]) -> dict[str, Any]:
    """A suite's scores without what follows from them: intervals, counts by source, top openings."""
    kept = {name: value for name, value in scores.items() if name in KEPT or not isinstance(value, (dict, list))}
    for each in kept.keys() & set(PARTS):
        kept[each] = {name: _numbers(part) for name, part in kept[each].items()}
    return kept


def _unseeded(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "seeds"}


def _difference(a: Any, b: Any) -> str | None:
    """Where two settings differ first, as `.key.key`; None where they are equal."""
    if a == b:
        return None
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found = ((key, _difference(a.get(key), b.get(key))) for key in {**a, **b})
        return next(f".{key}{inner}" for key, inner in found if inner is not None)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return next(f".{i}{inner}" for i, (x, y) in enumerate(zip(a, b, strict=True)) if (inner := _difference(x, y))
                    is not None)  # fmt: skip
    return f" ({a!r} and {b!r})"
