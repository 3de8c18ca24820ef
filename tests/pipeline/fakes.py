"""Tiny stages that stand in for training, and a script that runs them in a process of its own."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from apothecary.pipeline.stage import Executor, Job, Stage
from apothecary.pipeline.store import Store

PAUSE = 0.04  # seconds of a step: long enough to be killed within, on a busy machine too


def numbers(job: Job) -> dict:
    """rows.jsonl-like input."""
    (job.folder / "numbers.json").write_text(json.dumps(list(range(job.config["n"]))))
    return {"rows": job.config["n"]}


def train(job: Job) -> dict:
    """Add up the input step by step, with a checkpoint after each, renamed into place."""
    values = json.loads(job.inputs["numbers"].path("numbers.json").read_text())
    checkpoints = job.folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    state = json.loads((checkpoints / "last").read_text()) if (checkpoints / "last").exists() else {"step": 0, "sum": 0}
    (job.folder / "half.txt").write_text("written before the end")  # a leftover that a kill leaves behind
    resumed = state["step"]
    while state["step"] < len(values):
        job.check()
        state = {"step": state["step"] + 1, "sum": state["sum"] * 3 + values[state["step"]] + job.config["bias"]}
        time.sleep(job.config["pause"])
        (checkpoints / "new").write_text(json.dumps(state))
        os.replace(checkpoints / "new", checkpoints / "last")
    (job.folder / "weights").mkdir()
    (job.folder / "weights" / "model.json").write_text(json.dumps(state["sum"]))
    (job.folder / "train.log").write_text(f"{time.time()}")
    return {"resumed": resumed, "work": float(len(values))}


def fill(job: Job) -> dict:
    """Write a large file."""
    with (job.folder / "large.bin").open("wb") as file:
        for _ in range(64):
            file.write(bytes(2**16))
    return {}


def chain(n: int = 8, bias: int = 0, pause: float = 0.0, links: int = 1) -> Stage:
    """numbers -> train -> ... -> train."""
    first = stage = Stage("data", "numbers", numbers, {"n": n})
    for link in range(links):
        config = {"bias": bias + link, "pause": pause, "seed": 0}
        inputs = {"numbers": first, **({} if stage is first else {"before": stage})}
        stage = Stage("align", f"train {link}", train, config, inputs)
    return stage


if __name__ == "__main__":
    from pipeline import fakes

    root, what = Path(sys.argv[1]), sys.argv[2]
    end = Stage("align", "fill", fakes.fill, {}) if what == "fill" else fakes.chain(pause=PAUSE, links=3)
    print("ready", end.key, flush=True)
    artifact = Executor(Store(root)).execute(end)
    print(artifact.digest, artifact.manifest["metrics"])
