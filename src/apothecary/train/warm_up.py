"""Short training on a part of the pool before rows are scored: theta_0 of the gradient selectors."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from apothecary.data.rows import Chosen, Row
from apothecary.train.config import TrainConfig
from apothecary.train.fit import attach, train
from apothecary.train.method import TrainingMethod
from apothecary.train.on_demand import OnDemand

if TYPE_CHECKING:
    from apothecary.train.context import StepContext
    from apothecary.train.workbench import Workbench

NAME = "selector"  # the adapter that learns


def drawn(rows: Sequence[Row], share: float, seed: int) -> Chosen:
    """A share of the rows, rounded up, without replacement."""
    count = math.ceil(share * len(rows) - 1e-9)  # 0.07 of 100 is 7, and its product in floats a little more
    return Chosen(rows, random.Random(f"{seed}:warm-up").sample(range(len(rows)), count))


def warm_up(bench: Workbench, rows: Sequence[Row], config: TrainConfig, share: float) -> None:
    """Train to theta_0 on a share of the rows, drawn without replacement; 0 leaves the model as it is.

    No other row is read.
    """
    if chosen := drawn(rows, share, bench.seed):
        train(bench, TrainingMethod(), OnDemand(bench, chosen, config), config, name=NAME)
    else:
        bench.loaded.model = attach(bench, config, NAME)
    bench.loaded.model.eval()


def scoring(bench: Workbench, config: TrainConfig, roles: Sequence[str] = ()) -> StepContext:
    """A context to score with over what the warm-up trains: losses per token, in fp32.

    bf16 noise would drown the central differences, and a reduction belongs to the training it is set for.  Autocast is
    off; a model that was loaded in half precision stays so, and the check of the step judges it.
    """
    return bench.context(replace(config, reduction="token_mean", precision="fp32"), roles)
