"""A look at a trial half-way: its training is stopped at a checkpoint, the model of that step asked a few prompts.

The checkpoint is closed by the method's own `finish`, so the model that is asked is the one that would be served: a
defence that lives in the training alone is taken out first.  A training that goes on resumes from the same checkpoint
and ends as if nobody had looked.  The answer is stored, so that a killed trial is not looked at again at another step.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apothecary.pipeline.stage import Cancelled, Executor, Job, Stage
from apothecary.pipeline.store import MANIFEST, Artifact, write_atomic
from apothecary.sweep import guard
from apothecary.sweep.config import Prune

if TYPE_CHECKING:
    from apothecary.pipeline.plan import Planned
    from apothecary.sweep.trial import Task

LOOK = "look.json"


class _Reached(Cancelled):
    """The training has written the checkpoint at which it is looked at."""


def threshold(values: Sequence[float], prune: Prune) -> float | None:
    """The value below which a trial is hopeless: the quantile `below` of earlier looks; None while these are few."""
    if len(values) < prune.startup:
        return None
    return sorted(values)[math.ceil(prune.below * len(values)) - 1]


def look(task: Task, planned: Planned, stage: Stage, executor: Executor) -> dict[str, Any] | None:
    """{value, step, steps, harm} of the model at the first checkpoint from `prune.at` on, training up to there.

    None where there is none: the training is finished already, or writes none so early, or more is done to the model
    after it.  Nor does a judge with too few verdicts see anything: nothing is given up for it.  `stage` is the training
    of the trial.
    """
    prune, note = task.prune, task.folder / LOOK
    assert prune is not None
    if note.exists():
        return json.loads(note.read_text("utf-8"))
    if stage not in planned.evaluation.inputs.values():
        return None
    draft = executor.store.folder(stage.kind, stage.key).with_suffix(".partial") / "checkpoints"
    inputs = {name: executor.execute(source) for name, source in stage.inputs.items()}
    steps = total_steps(stage.config["train"], len(Job(stage.config, inputs, draft).rows("rows")))

    def check() -> None:
        if (found := _checkpoint(draft)) and prune.at * steps <= _step(found) < steps:
            raise _Reached

    usual, executor.check = executor.check, check
    try:
        executor.execute(stage)
        return None
    except _Reached:
        checkpoint = _checkpoint(draft)
    finally:
        executor.check = usual
    assert checkpoint is not None
    scores = _ask(prune.prompts, planned.evaluation, stage, executor, checkpoint, task.folder / "look")
    try:
        found = guard.harm(scores, task.measure, task.min_coverage)
    except guard.Uncovered:
        return None
    answer = {"value": found.value, "step": _step(checkpoint), "steps": steps, "harm": found.rate, "n": found.n,
              "margin": found.margin}  # fmt: skip
    write_atomic(note, json.dumps(answer) + "\n")
    return answer


def total_steps(train: Mapping[str, Any], rows: int) -> int:
    """Optimiser steps of a training."""
    if train["max_steps"] > 0:
        return train["max_steps"]
    return math.ceil(train["epochs"] * -(-rows // train["batch_size"]))


def _checkpoint(folder: Path) -> Path | None:
    found = [path for path in folder.glob("checkpoint-*") if path.suffix != ".partial"]
    return max(found, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _ask(prompts: int, evaluation: Stage, stage: Stage, executor: Executor, checkpoint: Path,
         folder: Path) -> dict[str, Any]:  # fmt: skip
    """The scores of the model at a checkpoint on at most so many prompts of each suite."""
    shutil.rmtree(folder, ignore_errors=True)
    inputs = {name: executor.execute(source) for name, source in stage.inputs.items()}
    model = _finished(stage, inputs, checkpoint, folder / "model")
    answers = folder / "answers"
    answers.mkdir()
    given = {name: model if source is stage else executor.execute(source) for name, source in evaluation.inputs.items()}
    limit = min(prompts, evaluation.config.get("limit") or prompts)
    evaluation.run(Job({**evaluation.config, "limit": limit}, given, answers))
    scores = json.loads((answers / "scores.json").read_text("utf-8"))
    shutil.rmtree(folder)
    return scores


def _finished(stage: Stage, inputs: Mapping[str, Artifact], checkpoint: Path, folder: Path) -> Artifact:
    """The artifact that the stage would have made if its training had ended at the checkpoint."""
    import torch

    from apothecary.train.trainer import METHOD_STATE

    copy = folder / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint, copy)
    state = torch.load(copy / METHOD_STATE, weights_only=True)
    torch.save({**state, "ended": True}, copy / METHOD_STATE)  # the trainer closes an ended training without a step
    stage.run(Job(stage.config, inputs, folder))
    (folder / MANIFEST).write_text(json.dumps({"kind": stage.kind, "config": dict(stage.config)}), "utf-8")
    return Artifact(folder)
