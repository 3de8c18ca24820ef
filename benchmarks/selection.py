"""What it costs to score rows by their gradients, relative to a forward and a backward for each row alone.

    python benchmarks/selection.py --out benchmarks/results/selection.json --rounds 5

    fast    a central difference along one direction, two batched forwards (pharmacist, post_attack_match, less_sgd)
    single  its inner product with each row's own gradient, the rows one at a time: exact
    less    cosines of Adam's directions with one target, from one batched forward and backward, without projection
    less, single    the same from each row's own gradient, the rows one at a time

Every round scores the same rows in each way, in an order that is mixed anew.  Rows have the shape's tokens, half of
them supervised; a pool of 5,000 is not gone through, but what it would take at the measured speed is stated.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor
from torch.nn.functional import normalize

from apothecary.curate.less import Less
from apothecary.train.batch import Batch
from apothecary.train.context import StepContext
from apothecary.train.early import Moments
from apothecary.train.per_row import row_gradients
from apothecary.train.scores import Weights, central_scores, checked_step, inner
from benchmarks.reference.common import loss_of
from benchmarks.rounds import clock, keep_freed_memory
from benchmarks.step_cost import CLOCKS, conditions, opened, write
from benchmarks.subjects import LAYOUTS, SHAPES, make_subject

POOL = 5_000
AGAINST = {"fast": "single", "less": "less, single"}
TARGETS = {"cpu": {"full": 2.0, "lora": 1.5}, "cuda": {"full": 5.0, "lora": 5.0}}  # of "fast"
CORRELATION = 0.999
Ways = dict[str, Callable[[], Tensor]]


def parts(batch: Batch, size: int) -> Iterator[Batch]:
    for i in range(0, len(batch.row_ids), size):
        tensors = {name: getattr(batch, name)[i : i + size] for name in ("input_ids", "attention_mask", "labels")}
        yield replace(batch, **tensors, row_ids=batch.row_ids[i : i + size])


def single_gradients(ctx: StepContext, batch: Batch) -> Iterator[Weights]:
    """Each row's gradient by its own forward and backward, in the obvious way."""
    parameters = ctx.parameters()
    for one in parts(batch, 1):
        with ctx.autocast():
            loss = loss_of(ctx.model, one)
        grads = torch.autograd.grad(loss, list(parameters.values()))
        yield dict(zip(parameters, grads, strict=True))


def slopes(ctx: StepContext, batch: Batch, size: int) -> Ways:
    """Along the gradient of the whole batch."""
    direction = ctx.grads(batch)
    step = checked_step(ctx, next(parts(batch, 16)), direction, "mean")
    return {
        "fast": lambda: torch.cat([central_scores(ctx, part, direction, "mean", step) for part in parts(batch, size)]),
        "single": lambda: torch.stack([inner(grads, direction) for grads in single_gradients(ctx, batch)]),
    }


def less(ctx: StepContext, batch: Batch, size: int) -> Ways:
    """Towards the gradient of the whole batch, which also makes Adam's moments."""
    method, grads = Less(projection_dim=0), ctx.grads(batch)
    moments: Moments = {name: (0.1 * grad, 0.01 * grad.square()) for name, grad in grads.items()}
    order = [name for name, _ in row_gradients(ctx, next(parts(batch, 1)))]
    target = normalize(torch.cat([grads[name].flatten() for name in order]), dim=0)

    def single() -> Tensor:
        found = []
        for own in single_gradients(ctx, batch):
            found.append(torch.cat([method.direction(own[name], *moments[name]).flatten() for name in order]))
        return normalize(torch.stack(found)) @ target

    return {
        "less": lambda: torch.cat([normalize(method.feature(ctx, part, 0, moments)) @ target
                                   for part in parts(batch, size)]),
        "less, single": single,
    }  # fmt: skip


def run_layout(settings: dict[str, Any], layout: str, number: int) -> dict[str, Any]:
    """Seconds of each way in one round, and the correlation of what is quick with what is exact."""
    subject = make_subject(replace(SHAPES[settings["shape"]], rows=settings["rows"]), layout, settings["device"],
                           settings["dtype"])  # fmt: skip
    subject.begin()
    subject.ctx.model.eval()
    ways = slopes(subject.ctx, subject.batch, settings["batch"])
    if layout == "lora":
        ways |= less(subject.ctx, subject.batch, settings["batch"])
    next(iter(ways.values()))()  # the first work of a process is slower
    seconds, scores = {}, {}
    for name in random.Random(f"{layout} {number}").sample(list(ways), len(ways)):
        began = clock(settings["device"])
        scores[name] = ways[name]()
        seconds[name] = clock(settings["device"]) - began
    agreement = {name: torch.stack([scores[name], scores[exact]]).double().corrcoef()[0, 1].item()
                 for name, exact in AGAINST.items() if name in scores}  # fmt: skip
    return {"seconds": seconds, "correlation": agreement}


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """How many times quicker each way is than rows one at a time: the median over rounds, the least and the most."""
    settings, found = result["settings"], {}
    for layout in LAYOUTS:
        rounds = [entry[layout] for entry in result["rounds"]]
        for name, exact in AGAINST.items():
            if name not in rounds[0]["seconds"]:
                continue
            ratios = [entry["seconds"][exact] / entry["seconds"][name] for entry in rounds]
            correlation = min(entry["correlation"][name] for entry in rounds)
            minutes = {way: median(entry["seconds"][way] for entry in rounds) / settings["rows"] * POOL / 60
                       for way in (name, exact)}  # fmt: skip
            entry = {"ratio": median(ratios), "least": min(ratios), "most": max(ratios), "correlation": correlation,
                     f"minutes for {POOL} rows": minutes}  # fmt: skip
            if name == "fast":
                target = TARGETS[settings["device"]][layout]
                entry |= {"target": target, "met": entry["ratio"] >= target and correlation >= CORRELATION}
            found[f"{layout}: {name}"] = entry
    return found


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, continued where it exists")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that the file shall hold (default 5)")
    parser.add_argument("--rows", type=int, default=32, help="rows that are scored in a round (default 32)")
    parser.add_argument("--batch", type=int, default=32, help="rows of a batched pass (default 32)")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", choices=CLOCKS, default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args(given)
    if options.device == "cpu":
        torch.set_num_threads(1)
        keep_freed_memory()
    wanted = conditions(options)
    wanted["settings"] |= {"rows": options.rows, "batch": options.batch, "pool": POOL}
    result = opened(options.out, wanted)
    for number in range(len(result["rounds"]), options.rounds):
        result["rounds"].append({layout: run_layout(result["settings"], layout, number) for layout in LAYOUTS})
        result["summary"] = summarise(result)
        write(options.out, result)
        print(f"round {number + 1} of {options.rounds} is in {options.out}", flush=True)


if __name__ == "__main__":
    main()
