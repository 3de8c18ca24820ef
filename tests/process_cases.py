"""What `train/test_processes.py` runs in one process and in two; as a script, one of the two."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from benches import float64_model, make_bench, make_rows, snapshot
from cases import CASES, Case, Seeded
from safetensors.torch import save_file

from apothecary.align.sft import Sft
from apothecary.errors import TrainingError
from apothecary.finetune.security_vectors import VectorTraining
from apothecary.train.config import TrainConfig
from apothecary.train.fit import train
from apothecary.train.method import Needs, TrainingMethod

_BASE = {"max_steps": 3, "batch_size": 8, "learning_rate": 1e-2, "warmup_ratio": 0.0, "save_every": 0, "log_every": 1,
         "aux_batch_size": 3, "accumulation": 2}  # fmt: skip


class OneLayer(TrainingMethod):
    """Moves layer 1 only, under weight decay: a parameter without gradient stays without one in every layout."""

    def step(self, ctx, batch, state):
        if ctx.micro == 0:
            ctx.trainable([1])
        loss = ctx.backward(batch)
        ctx.model.transformer.h[1].ln_1.weight.grad = None
        return loss


class Probing(TrainingMethod):
    """A weight-space direction, which must be the same in all processes, and surgery on the complete gradient."""

    def step(self, ctx, batch, state):
        direction = ctx.grads(batch)
        with ctx.perturbed({name: -0.1 * g for name, g in direction.items()}):
            loss = ctx.backward(batch)
        if ctx.last_micro_step:
            ctx.sum_gradients()
            grads = [p.grad for p in ctx.parameters().values()]
            norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
            for g in grads:
                g.div_(norm)
        return loss


EXTRA = {
    "one micro-batch": Case("", Sft, settings={"accumulation": 1}),
    "sample_mean": Case("", Sft, settings={"reduction": "sample_mean"}),
    "converged": Case("", lambda: VectorTraining(lamb=0.0, target_nll=4.0), "lora", settings={"max_steps": 30}),
    "one layer": Case("", OneLayer, settings={"weight_decay": 0.5}),
    "probing": Case("", Probing, settings={"accumulation": 1}),
}
ALL = {name: case for name, case in CASES.items() if "two_processes" in case.tests} | EXTRA


class SingleOnly(TrainingMethod):
    name, kind = "alone", "align"
    needs = Needs(layouts=("single",))


def run(name: str, folder: Path) -> None:
    """Final weights, logged values and history of a case, written into `folder`.

    A method that is defined on a micro-batch gets the same micro-batches on one process as on two.
    """
    case, processes = ALL[name], int(os.environ.get("WORLD_SIZE", "1"))
    settings = _BASE | {"parameters": case.parameters, **case.settings}
    if not case.linear:
        settings["accumulation"] *= 2 // processes
    recorder = Seeded(case.make())
    bench = case.bench(folder / "bench", float64_model)
    result = train(bench, recorder, make_rows("row", 12), TrainConfig(**settings))
    if result.metrics["rank"] == 0:
        save_file({n: p.contiguous() for n, p in snapshot(bench.loaded.model).items() if "lm_head" not in n},
                  folder / "weights.safetensors")  # fmt: skip
        record = {"logged": recorder.logged, "loss": [entry["loss"] for entry in result.history],
                  "grad_norm": [entry["grad_norm"] for entry in result.history]}  # fmt: skip
        (folder / "record.json").write_text(json.dumps(record))


def main(root: Path) -> None:
    rank = os.environ["RANK"]
    try:
        train(make_bench(root / "refused"), SingleOnly(), make_rows("row", 4), TrainConfig(max_steps=1))
    except TrainingError as error:
        (root / f"refused-{rank}.txt").write_text(str(error))
    for name in ALL:
        folder = root / name
        folder.mkdir(exist_ok=True)
        run(name, folder)
    torch.distributed.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    # gloo's threads release tensors after the last collective; one that asks for the interpreter's lock while Python
    # shuts down is killed inside a destructor and aborts the process.  So nothing is torn down after success.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
