"""The stage that asks a model the held-out prompts and scores its answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from apothecary.evals.evaluation import evaluate as ask
from apothecary.evals.evaluation import write_evaluation
from apothecary.evals.suites import asked
from apothecary.pipeline.steps import chain
from apothecary.registry import lookup

if TYPE_CHECKING:
    from apothecary.data.rows import Row
    from apothecary.pipeline.stage import Job


def suites(job: Job) -> dict[str, list[Row]]:
    """The prompts of each suite, from all its sources."""
    found: dict[str, list[Row]] = {}
    for name in job.group("suite"):
        found.setdefault(name.split(".")[0], []).extend(job.rows(f"suite.{name}"))
    return asked(found, job.config["limit"])


def evaluate(job: Job) -> Mapping[str, Any]:
    """responses.jsonl and scores.json; the metrics say in which dtype, and how far batches changed the text."""
    import torch

    torch.manual_seed(0)
    prompts = suites(job)
    judge = lookup("judge", job.config["judge"])()
    answers = ask(chain.load(job), prompts, judge, job.config["max_new_tokens"], job.config["batch_size"])
    write_evaluation(job.folder, answers)
    return {"work": float(sum(map(len, prompts.values()))), "generation": answers.generation}
