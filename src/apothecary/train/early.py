"""Early checkpoints of a short training, and the influence scores that are summed over them.

Selectors that look at a row through several young models (LESS, EL2N) train once and visit the checkpoints in turn.  It
is an ordinary training: killed at any moment, it continues from its last checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from apothecary.data.rows import Row, by_id
from apothecary.train.config import TrainConfig
from apothecary.train.fit import train
from apothecary.train.method import TrainingMethod
from apothecary.train.on_demand import OnDemand
from apothecary.train.trainer import METHOD_STATE, complete_checkpoints
from apothecary.train.warm_up import NAME, drawn
from apothecary.train.workbench import Workbench

Moments = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Early:
    """A checkpoint; while it is visited, the bench's model has its weights."""

    number: int
    learning_rate: float  # mean over the steps since the checkpoint before
    folder: Path

    def moments(self) -> Moments:
        """Adam's running means of the gradient and of its square, by parameter."""
        stored = torch.load(self.folder / "optimizer.pt", weights_only=True)["state"]
        order = torch.load(self.folder / METHOD_STATE, weights_only=True)["order"]
        return {order[i]: (entry["exp_avg"], entry["exp_avg_sq"]) for i, entry in stored.items()}


def early(bench: Workbench, rows: Sequence[Row], config: TrainConfig, count: int) -> Iterator[Early]:
    """Train on rows, then visit `count` checkpoints at equal distances, or one after each step where these are fewer.

    The last stands at the end, or by fewer than `count` steps before it; no step is taken that was not asked for.
    """
    given = OnDemand(bench, rows, config)
    steps = config.max_steps
    if steps <= 0:
        steps = math.ceil(config.epochs * -(-len(given) // config.batch_size))  # as an ordinary training counts them
    count = min(count, steps)
    every = steps // count
    train(bench, TrainingMethod(), given, replace(config, max_steps=every * count, save_every=every, log_every=1,
                                                  keep_checkpoints=count), name=NAME)  # fmt: skip
    folders = complete_checkpoints(bench.folder / "checkpoints")
    history = json.loads((folders[-1] / "trainer_state.json").read_text("utf-8"))["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    for number, folder in enumerate(folders):
        tensors = load_file(folder / "trainable.safetensors")
        with torch.no_grad():
            for key, p in bench.loaded.model.named_parameters():
                if key in tensors:
                    p.copy_(tensors[key])
        yield Early(number, sum(rates[number * every : (number + 1) * every]) / every, folder)


def subtasks(rows: Sequence[Row]) -> list[list[int]]:
    """Positions of the validation rows of each subtask: what `meta` names as such, else the row's source."""
    found: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        found.setdefault(str(row.meta.get("subtask", row.source)), []).append(i)
    return list(found.values())


def influence(bench: Workbench, rows: Sequence[Row], share: float, config: TrainConfig,
              products: Callable[[Early], np.ndarray]) -> dict[str, float]:  # fmt: skip
    """max over subtasks of sum_k (eta_k / sum eta) x_k, by row id; -inf for a row without numbers.

    x_k = `products(checkpoint)`, [N, subtasks], after each epoch of a training on a share of the rows.
    """
    points = early(bench, drawn(by_id(rows), share, bench.seed), config, int(config.epochs))
    found = [(point.learning_rate, products(point)) for point in points]
    whole = sum(rate for rate, _ in found)
    best = np.max(sum(rate / whole * matrix for rate, matrix in found), 1)
    scores = np.where(np.isnan(best), -np.inf, best).tolist()
    return {row.id: score for row, score in zip(rows, scores, strict=True)}
