"""Rounds of measured steps: every configuration once a round, in an order that is mixed anew each time."""

from __future__ import annotations

import ctypes
import gc
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.configurations import BASELINE, CONFIGURATIONS
from benchmarks.memory import memory_of
from benchmarks.subjects import SHAPES, Subject, make_subject

BASELINES = 2  # steps of plain SFT in a round, at places of their own
Times = dict[str, float]  # seconds: "passes" and "optimiser"


def keep_freed_memory() -> None:
    """Let glibc hand no freed memory back: else whoever asks first pays for fresh pages in its own time."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks
    except (OSError, AttributeError):
        pass  # another C library: the figures are a little noisier


def clock(device: str) -> float:
    """Processor time of this process, which other load disturbs little; with a GPU, wall time once it is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def collected_by_hand() -> Iterator[None]:
    """No garbage collection but between steps, and none of what is there already."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def timed(subject: Subject, passes: Callable[[], object], device: str) -> Times:
    """One training step."""
    gc.collect()
    subject.begin()
    start = clock(device)
    passes()
    between = clock(device)
    subject.update()
    return {"passes": between - start, "optimiser": clock(device) - between}


def due(name: str, number: int) -> bool:
    return number % CONFIGURATIONS[name].every == 0


def order(names: Iterable[str], rounds: int, source: random.Random) -> list[str]:
    """The steps of a round: each configuration once, the baseline and random draws more often."""
    steps = []
    for name in names:
        if name == BASELINE:
            steps += [name] * BASELINES
        else:
            steps += [name] * -(-CONFIGURATIONS[name].draws // rounds)
    source.shuffle(steps)
    return steps


def run_layout(settings: dict[str, Any], layout: str, names: list[str], number: int,
               memory: dict[str, dict[str, int]]) -> dict[str, list[Times]]:  # fmt: skip
    """A round over one layout's configurations; fills `memory` for those that it lacks."""
    device, shape = settings["device"], SHAPES[settings["shape"]]
    subject = make_subject(shape, layout, device, settings["dtype"], seed=number)
    names = [name for name in names if layout in CONFIGURATIONS[name].layouts]
    steps = order(names, settings["rounds"], random.Random(f"{layout} {number}"))
    found: dict[str, list[Times]] = {name: [] for name in steps}
    with collected_by_hand():
        with CONFIGURATIONS[BASELINE].opened(subject) as passes:
            timed(subject, passes, device)  # the first step of a process is slower
        for name in steps:
            with CONFIGURATIONS[name].opened(subject) as passes:
                if name not in memory:
                    subject.begin()
                    memory[name] = memory_of(passes, subject.ctx.model, shape.vocabulary)
                    subject.update()
                found[name].append(timed(subject, passes, device))
    return found
