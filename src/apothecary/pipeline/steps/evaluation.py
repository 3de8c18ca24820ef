"""The stage that asks a model the held-out prompts and scores its answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from apothecary.data.formats import unique_ids
from apothecary.evals.evaluation import evaluate as ask
from apothecary.evals.evaluation import write_evaluation
from apothecary.evals.suites import spread
from apothecary.pipeline.steps import chain
from apothecary.registry import lookup

if TYPE_CHECKING:
    from apothecary.data.rows import Row
    from apothecary.pipeline.stage import Job


def suites(job: Job) -> dict[str, list[Row]]:
    """The prompts of each suite from all its sources, each (prompt, expected answer) once."""
    found: dict[str, dict[tuple[Any, ...], Row]] = {}
    for name in job.inputs:
        if name.startswith("suite."):
            suite = found.setdefault(name.split(".")[1], {})
            for row in job.rows(name):
                suite.setdefault((row.prompt, row.response), row)
    return {name: spread(unique_ids(rows.values()), job.config["limit"]) for name, rows in found.items()}


def evaluate(job: Job) -> Mapping[str, Any]:
    """responses.jsonl and scores.json."""
    import torch

    torch.manual_seed(0)
    prompts = suites(job)
    judge = lookup("judge", job.config["judge"])()
    answers = ask(chain.load(job), prompts, judge, job.config["max_new_tokens"], job.config["batch_size"])
    write_evaluation(job.folder, answers)
    return {"work": float(sum(map(len, prompts.values())))}
