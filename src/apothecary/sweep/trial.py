"""One trial, in a process of its own: attack, fine-tune, look half-way, evaluate; through the stages of the store.

What it finds is a dictionary that JSON knows (`Found`).  Alignment and the defence's preparation are the service's:
they lie in the store before the first trial, and no trial makes them again.
"""

from __future__ import annotations

import json
import logging
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apothecary.errors import ApothecaryError, StoreError
from apothecary.pipeline.measure import peak_memory
from apothecary.pipeline.plan import Planned
from apothecary.pipeline.stage import Executor
from apothecary.pipeline.store import Artifact, Store
from apothecary.sweep import guard
from apothecary.sweep.config import Prune
from apothecary.sweep.recipe import the_model

log = logging.getLogger(__name__)
Found = dict[str, Any]  # state (complete, pruned, failed), reason, costs; of a complete one also scores, outcomes
RESULT = "result.json"
SERVICE = ("data", "overlap", "curate", "align", "prepare")  # kinds of stages that do not belong to a trial
LISTS, DETAILS = ("by_source", "judges"), ("by_category", "agreement", "identity")  # of scores.json
SAMPLES = {"harmful": 3, "triggered": 3, "benign": 2, "overrefusal": 2, "task": 2}  # answers shown of each suite
PROMPT = 140  # characters of a prompt that is shown
LIGHT = ("attack", "plant", "evaluate")  # a trial's own stages without weights: they stay


@dataclass(frozen=True)
class Task:
    """What a worker is given; everything can be pickled."""

    arm: str
    name: str  # number of a trial; or clean, default, and the like
    mapping: dict[str, Any] = field(hash=False)  # the trial's recipe
    store: Path
    folder: Path  # of this trial
    measure: str
    min_coverage: float
    stage: str = "tuned"  # which model: what the attacker tuned, or the aligned one before he came
    prune: Prune | None = None
    hopeless: float | None = None  # value of a look half-way below which the trial is given up; None: none yet
    details: bool = False  # whether the page shows its categories, its judge's identity and samples
    threads: int = 1


def work(task: Task) -> Found:
    """Run a trial and say what came of it.

    An error of the attack (NaN, rows that do not fit) is a result: failed, with its reason.  So are too few verdicts,
    which have the mark `uncovered` beside it.  A full disk or an altered store is not the attack's doing and is raised.
    """
    planned, start, spent = the_model(task.mapping, task.stage), time.perf_counter(), time.process_time()
    try:
        found = _run(task, planned)
    except StoreError:
        raise
    except (ApothecaryError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        log.exception("trial %s of %s failed", task.name, task.arm)
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        found = {"state": "failed", "reason": reason}
    here = {"seconds": round(time.perf_counter() - start, 3), "cpu_seconds": round(time.process_time() - spent, 3)}
    return {**found, "costs": {**here, **peak_memory()}}  # stages know neither a look half-way nor what was given up


def _run(task: Task, planned: Planned) -> Found:
    from apothecary.sweep.probe import look

    executor, found = Executor(Store(task.store)), {}
    own = [stage for stage in planned.evaluation.lineage() if stage.kind not in SERVICE]
    made = [(stage.kind, stage.key) for stage in own if stage.kind not in LIGHT and executor.state(stage) == "missing"]
    stage = next((stage for stage in own if stage.kind == "finetune"), None)
    if task.prune is not None and stage is not None:
        found["look"] = seen = look(task, planned, stage, executor)
        if seen and task.hopeless is not None and seen["value"] < task.hopeless:
            return {**found, "state": "pruned", "reason": f"harm among the lowest after {seen['step']} of "
                    f"{seen['steps']} steps"}  # fmt: skip
    found |= read(executor.execute(planned.evaluation), task.measure, task.min_coverage, task.details)
    found["made"] = made
    return found


def read(evaluation: Artifact, measure: str, least: float, details: bool = False) -> Found:
    """State, scores, harm and the outcome of each prompt of an evaluation; with `details` also what the page shows.

    Where fewer than the share `least` of the harmful prompts have a verdict there is no harm, but the mark `uncovered`.
    """
    scores = json.loads(evaluation.path("scores.json").read_text("utf-8"))
    lines = evaluation.path("responses.jsonl").read_text("utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    found: Found = {"scores": brief(scores, LISTS if details else (*LISTS, *DETAILS))}
    if details:
        found["samples"] = samples(rows)
    try:
        harm = guard.harm(scores, measure, least)
    except guard.Uncovered as error:
        return {**found, "state": "failed", "reason": str(error), "uncovered": error.mark}
    return {
        **found, "state": "complete", "reason": None,
        "harm": {"rate": harm.rate, "interval": list(harm.interval), "count": harm.count, "n": harm.n,
                 "margin": harm.margin, "coverage": harm.coverage, "suite": harm.suite, "value": harm.value},
        "outcomes": guard.outcomes(rows, scores, measure),
    }  # fmt: skip


def brief(scores: Mapping[str, Any], without: Sequence[str]) -> dict[str, Any]:
    """Scores without the lists that nobody reads for each of many trials."""
    return {suite: {key: value for key, value in part.items() if key not in without} if isinstance(part, Mapping)
            else part for suite, part in scores.items()}  # fmt: skip


def samples(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first answers of each suite by label and length; what the model said stays in the store."""
    left, found = dict(SAMPLES), []
    for row in rows:
        if left.get(row["suite"], 0) > 0:
            left[row["suite"]] -= 1
            prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
            found.append({"suite": row["suite"], "prompt": textwrap.shorten(prompt, PROMPT, placeholder="…"),
                          "label": row["label"], "length": len(row["response"])})  # fmt: skip
    return found
