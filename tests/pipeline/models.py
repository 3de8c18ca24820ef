"""Stand-ins for the stages that need a model: instant, and faithful in what they read and write."""

from __future__ import annotations

import json

import pytest

from apothecary.pipeline import plan, preflight
from apothecary.pipeline.stage import Job
from apothecary.pipeline.steps import chain

RECIPE = {
    "name": "demo run",
    "model": "lab",
    "data": {
        "align": "lab:align", "harmful": "lab:defence", "benign": "lab:benign", "validation": "lab:validation",
        "customer": "lab:customer_train", "general": "lab:customer_general", "attack": "lab:attack",
    },
    "evaluate": {"harmful": ["lab:eval_harmbench", "lab:eval_jailbreakbench"], "benign": "lab:eval_benign", "limit": 6},
    "align": {"train": {"learning_rate": "6e-4", "parameters": "full"}},
    "attack": {"p": [0, 0.1], "n": 50},
    "arms": {
        "undefended": {},
        "security vectors": {"finetune": {"method": "security_vectors"}},
        "vaccine": {"align": {"method": "vaccine"}},
        "random half": {"curate": {"method": "random", "keep": 0.5}},
    },
}  # fmt: skip


def train(job: Job) -> dict:
    job.check()
    rows = job.rows("rows")
    kind = "weights" if job.config["train"]["parameters"] == "full" else "adapter"
    (job.folder / kind).mkdir()
    (job.folder / kind / "model.json").write_text(json.dumps([job.config["method"], len(rows), rows[0].id]))
    return {"rows": len(rows), "work": float(len(rows))}


def prepare(job: Job) -> dict:
    (job.folder / "prepared").mkdir()
    (job.folder / "prepared" / "vectors").write_text(json.dumps(sorted(job.group("aux"))))
    return {"work": 1.0}


def curate(job: Job) -> dict:
    rows = job.rows("rows")[::2]
    (job.folder / "rows.jsonl").write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
    return {"rows": len(rows), "work": 1.0}


def evaluate(job: Job) -> dict:
    """Every model refuses; scores name the folders that the model would be loaded from."""
    from apothecary.pipeline.steps.evaluation import suites

    found = suites(job)
    lines = [
        {
            "suite": suite,
            "id": row.id,
            "prompt": [{"role": "user", "content": row.text}],
            "response": "No.",
            "label": "refuses",
        }
        for suite, rows in found.items()
        for row in rows
    ]
    (job.folder / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    weights, adapters = chain.parts(job.inputs)
    scores = {suite: {"n": len(rows), "refuses": 1.0, "judge": job.config["judge"]} for suite, rows in found.items()}
    scores["loaded"] = [str(path.parent.parent.name) for path in (weights, *adapters) if path]
    (job.folder / "scores.json").write_text(json.dumps(scores))
    return {"work": float(len(lines))}


def install(patch: pytest.MonkeyPatch) -> None:
    """Let the planner use the stand-ins."""
    patch.setattr(plan.training, "train", train)
    patch.setattr(plan.training, "prepare", prepare)
    patch.setattr(plan.selection, "curate", curate)
    patch.setattr(plan.evaluation, "evaluate", evaluate)
    patch.setattr(preflight, "check", lambda stages, executor: None)


def edit(**changes: object) -> dict:
    """The recipe with changed top-level keys; `key=None` takes one out."""
    return {key: value for key, value in {**RECIPE, **changes}.items() if value is not None}
