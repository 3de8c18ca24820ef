"""Long loops show where they are: a bar, an estimate of time and memory, and an ear for who wants them to stop."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from tqdm.auto import tqdm

if TYPE_CHECKING:
    import torch

    from apothecary.train.workbench import Workbench

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Watch = Callable[[Iterable[int], int, str], Iterable[int]]  # turns, how many, what they are called
WORTH_TELLING = 10.0  # seconds; a shorter loop is over before its estimate is read


def watched(bench: Workbench, items: Iterable[Item], total: int, name: str, unit: str = "row") -> Iterator[Item]:
    """The items, `total` of them; before each the bench may stop, and the first tells what all of them will take."""
    with bar_of(bench, total, name, unit) as bar:
        for i, item in enumerate(items):
            bench.stop()
            began = time.perf_counter()
            yield item
            if i == 0:
                estimate(bench, f"{name}: {total:,} {unit}s", (time.perf_counter() - began) * total)
            bar.update()


def unwatched(turns: Iterable[int], total: int, name: str) -> Iterable[int]:
    """The turns as they are: for loops that nobody waits for."""
    return turns


def bar_of(bench: Workbench, total: int, name: str, unit: str = "row") -> tqdm:
    return tqdm(total=total, desc=name, unit=unit, disable=not bench.progress, leave=False)


def estimate(bench: Workbench, what: str, seconds: float) -> None:
    """`tell`, unless it is over before it is read."""
    if seconds > WORTH_TELLING:
        tell(bench.progress, what, seconds, next(bench.loaded.model.parameters()).device)


def tell(shown: bool, what: str, seconds: float, device: torch.device | None = None) -> None:
    """Log, and where bars are `shown` write above them, how long `what` will take and how much memory was taken at the
    peak so far."""
    kind = device.type if device else "cpu"
    if kind == "cuda":
        import torch

        memory = torch.cuda.max_memory_allocated(device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    text = f"{what}, about {seconds / 60:.1f} min and {memory / 2**30:.1f} GiB of {kind} memory"
    log.info(text)
    if shown:
        tqdm.write(text)
