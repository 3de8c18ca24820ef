"""RepNoise's hooks in the authors' code: registered on every module at every step and never removed.

    python benchmarks/repnoise_leak.py --out benchmarks/results/repnoise_leak.json

The same step with and without the leak, in turn; the curve is the time of each step and the number of hooks after it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.reference import repnoise
from benchmarks.reference.common import decoder
from benchmarks.rounds import collected_by_hand, keep_freed_memory, timed
from benchmarks.step_cost import CLOCKS, conditions, write
from benchmarks.subjects import SHAPES, Subject, make_subject


@contextmanager
def leaking(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """The MLP outputs by way of a new hook on every module, all of which stay."""
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _inputs: object, output: Tensor) -> None:
        outputs[module] = output

    for module in model.modules():
        module.register_forward_hook(keep)
    found: dict[int, Tensor] = {}
    yield found  # filled once the forward has run
    found.update({layer: outputs[block.mlp] for layer, block in enumerate(decoder(model).layers)})


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def step(subject: Subject, leak: bool) -> None:
    shape = (subject.shape.rows, subject.shape.tokens, subject.shape.hidden)
    with subject.ctx.autocast():
        repnoise.step(subject.ctx.model, subject.batch, *subject.ctx.pairs(),
                      noise=lambda _layer: torch.randn(shape, device=subject.ctx.device),
                      watched=leaking if leak else repnoise.mlp_outputs)  # fmt: skip


def curves(subjects: dict[str, Subject], steps: int, device: str) -> dict[str, list[dict[str, float]]]:
    """Seconds and hooks of each step, by kind."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in subjects}
    with collected_by_hand():
        for _ in range(steps):
            for kind, subject in subjects.items():
                times = timed(subject, partial(step, subject, kind == "leaking"), device)
                found[kind].append({"seconds": times["passes"], "hooks": hooks_on(subject.ctx.model)})
    return found


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", choices=CLOCKS, default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args(given)
    if options.device == "cpu":
        torch.set_num_threads(1)
        keep_freed_memory()
    shape = replace(SHAPES[options.shape], rows=2, tokens=20)  # where hooks show: they cost the same on any batch
    subjects = {kind: make_subject(shape, "lora", options.device, options.dtype) for kind in ("clean", "leaking")}
    found = conditions(options)
    found["settings"]["sizes"] = shape.__dict__
    write(options.out, found | {"curves": curves(subjects, options.steps, options.device)})


if __name__ == "__main__":
    main()
