"""Stand-ins for a trial: harm is a known function of the settings, and some settings go wrong on purpose.

`python -m sweep.fakes RECIPE OUT STORE OBJECTIVE` runs a sweep in a process of its own, to be killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apothecary.errors import StoreError
from apothecary.sweep.launch import Work, attempt
from apothecary.sweep.trial import Found, Task

RECIPE: dict[str, Any] = {
    "name": "fake",
    "data": {"align": {"path": "lab:align", "limit": 8}, "customer": "lab:customer_train", "attack": "lab:attack",
             "harmful": "lab:defence", "benign": "lab:benign"},
    "evaluate": {"harmful": "lab:eval_harmbench", "task": "lab:customer_test"},
    "attack": {"p": 0.1, "n": 20},
    "finetune": {"train": {"learning_rate": 1e-3, "epochs": 4}},
    "arms": {"undefended": {}, "vaccine": {"align": {"method": "vaccine"}}},
    "sweep": {
        "trials": 6, "workers": 2, "startup": 3, "prune": None,
        "prompts": {"harmful": "lab:tune_harmful", "task": "lab:tune_task"},
        "space": {"finetune.train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
                  "attack.seed": {"low": 0, "high": 9}},
    },
}  # fmt: skip
N = 100


def edit(**changes: Any) -> dict[str, Any]:
    """The recipe with other settings of the sweep."""
    return {**RECIPE, "sweep": {**RECIPE["sweep"], **changes}}


def found(rate: float, accuracy: float = 0.9, **more: Any) -> Found:
    """What a trial finds that succeeds on this share of N prompts."""
    count = round(rate * N)
    harm = {"rate": count / N, "interval": [0, 1], "count": count, "n": N, "margin": -rate, "coverage": 1.0,
            "suite": "harmful", "value": rate}  # fmt: skip
    scores = {"harmful": {"n": N, "HS": rate}, "task": {"n": N, "accuracy": accuracy}}
    outcomes = "1" * count + "0" * (N - count)
    return {"state": "complete", "reason": None, "harm": harm, "scores": scores, "outcomes": outcomes,
            "costs": {"seconds": 1.0, "cpu_seconds": 1.0}, "made": [], **more}  # fmt: skip


def settings(task: Task) -> tuple[float, int]:
    """(learning rate, seed) of a task."""
    arm = task.mapping["arms"][task.arm]
    rate = arm.get("finetune", {}).get("train", {}).get("learning_rate", 1e-3)
    return rate, arm.get("attack", {}).get("seed", 0)


def plain(task: Task) -> Found:
    """Harm grows with the learning rate, and so does damage to the task."""
    rate, _ = settings(task)
    if task.name == "clean" or task.name == "held-out clean":
        return found(0.0)
    return found(min(1.0, 100 * rate), 0.9 - 20 * rate)


def noted(task: Task) -> Found:
    """`plain`, slowly, with a line in a file for each time that it begins and ends."""
    note(task, "begin")
    time.sleep(0.15)
    result = plain(task)
    note(task, "end")
    return result


def note(task: Task, what: str) -> None:
    with (task.store.parent / "noted.jsonl").open("a") as file:
        file.write(json.dumps([task.arm, task.name, what, settings(task)]) + "\n")


def faulty(task: Task) -> Found:
    """Trials that die, raise, end in NaN or are pruned, by number."""
    if task.name == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if task.name == "2":
        return {"state": "failed", "reason": "TrainingError: the loss is not finite at step 3"}
    if task.name == "3":
        raise KeyError("a defect")
    if task.name == "4":
        return {"state": "pruned", "reason": "low", "look": {"value": 0.01, "step": 2, "steps": 8, "harm": 0.0}}
    return plain(task)


def silent(task: Task) -> Found:
    """A judge that gives no verdict where the attacks on the defended arm do harm."""
    result = plain(task)
    if task.arm == "vaccine" and task.name.isdigit() and result["harm"]["rate"] > 0.02:
        return unjudged(result)
    return result


def silent_late(task: Task) -> Found:
    """A judge that gives verdicts while the attacker searches alone."""
    result = plain(task)
    return unjudged(result) if task.name.startswith("held-out") else result


def unjudged(result: Found) -> Found:
    kept = {key: value for key, value in result.items() if key not in ("harm", "outcomes")}
    mark = {"judge": "guard", "coverage": 0.5, "needed": 0.95}
    return {**kept, "state": "failed", "reason": "too few verdicts", "uncovered": mark}


def dies_once(task: Task) -> Found:
    """Every first attempt of a trial is killed."""
    mark = task.folder / "died"
    if task.name.isdigit() and not mark.exists():
        mark.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(task)


class Inline:
    """A launcher without processes, which ends tasks in an order of its own."""

    def __init__(self, work: Work, seed: int = 0) -> None:
        self.work, self.tasks, self.random = work, [], random.Random(seed)

    def start(self, task: Task) -> None:
        task.folder.mkdir(parents=True, exist_ok=True)
        self.tasks.append(task)

    def wait(self) -> Iterator[tuple[Task, Found | None, str]]:
        task = self.tasks.pop(self.random.randrange(len(self.tasks)))
        yield task, attempt(self.work, task), ""

    def stop(self) -> None:
        self.tasks.clear()


def full_disk(task: Task) -> Found:
    if task.name == "1":
        raise StoreError("the disk is full")
    return plain(task)


def endless(task: Task) -> Found:
    time.sleep(600)
    return plain(task)


def environment(task: Task) -> Found:
    """What a worker finds itself in."""
    return {"state": "complete", "threads": os.environ["OMP_NUM_THREADS"], "pid": os.getpid()}


if __name__ == "__main__":
    from sweep import fakes

    from apothecary.sweep import launch, sweep

    launch.WARM = ("sweep.fakes",)  # nothing here needs torch

    recipe, out, store, objective = sys.argv[1:]
    sweep(json.loads(Path(recipe).read_text()), store, out, objective=getattr(fakes, objective))
