"""One pass over rows of any number: measured batch by batch, stored chunk by chunk, continued after a kill.

    sweep     a number for each row, by id; -inf for a row that is dropped for its length: it is not kept
    features  a vector for each row, as a matrix on disk; NaN for such a row

Rows are read and rendered one chunk at a time, so that neither the pool nor its token ids need fit in memory.  A
finished chunk stands in `bench.folder`/checkpoints/sweep/NAME, which a stage that was killed finds again and a finished
one drops; it counts for the very rows it was made from.  Whatever else decides the numbers (weights, settings) belongs
into `name`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from apothecary.data.chat import Rendered
from apothecary.data.rows import Row, digest
from apothecary.errors import TrainingError
from apothecary.models.generate import evaluating
from apothecary.train.batch import Batch, collate, weigh
from apothecary.train.config import TrainConfig
from apothecary.train.context import StepContext
from apothecary.train.progress import bar_of, tell
from apothecary.train.workbench import Workbench

CHUNK = 512  # rows that are in memory together, and that a kill costs at most
Measure = Callable[[Batch], Tensor]


def sweep(bench: Workbench, ctx: StepContext, rows: Sequence[Row], measure: Measure, config: TrainConfig,
          name: str = "scores", batch_size: int = 32, chunk: int = CHUNK) -> dict[str, float]:  # fmt: skip
    """`measure(batch)`, [B], of every row by id.  Raises TrainingError for a number that is not finite."""
    values = _Sweep(bench, ctx, measure, config, name, batch_size, chunk).run(rows, 1, np.dtype(np.float64))[:, 0]
    scores = np.where(np.isnan(values), -np.inf, values).tolist()
    return {row.id: score for row, score in zip(rows, scores, strict=True)}


def features(bench: Workbench, ctx: StepContext, rows: Sequence[Row], measure: Measure, config: TrainConfig,
             name: str, width: int, batch_size: int = 32, chunk: int = CHUNK) -> np.ndarray:  # fmt: skip
    """`measure(batch)`, [B, width], of every row: a read-only map of a file, [N, width], in the order of the rows.

    It is fp32, or fp64 under a model in fp64.  Raises TrainingError for a vector that is not finite.
    """
    wide = next(ctx.model.parameters()).dtype == torch.float64
    dtype = np.dtype(np.float64 if wide else np.float32)
    return _Sweep(bench, ctx, measure, config, name, batch_size, chunk).run(rows, width, dtype)


@dataclass
class _Sweep:
    bench: Workbench
    ctx: StepContext
    measure: Measure
    config: TrainConfig
    name: str
    batch_size: int
    chunk: int
    told: bool = False  # whether time and memory have been estimated

    def run(self, rows: Sequence[Row], width: int, dtype: np.dtype) -> np.ndarray:
        store = _Chunks(self.bench.folder / "checkpoints" / "sweep" / self.name, (len(rows), width), dtype)
        with evaluating(self.ctx.model), bar_of(self.bench, len(rows), self.name) as bar:
            for start in range(0, len(rows), self.chunk):
                part = [rows[i] for i in range(start, min(start + self.chunk, len(rows)))]
                content = digest(part)
                if not store.has(start, content):
                    values = np.full((len(part), width), np.nan, dtype)
                    self._fill(values, part, len(rows) - start, bar)
                    store.put(start, content, values)
                bar.update(len(part))
                del part  # else two chunks are in memory while the next one is read
        return store.matrix()

    def _fill(self, values: np.ndarray, part: Sequence[Row], left: int, bar: tqdm) -> None:
        """Measure the rows of a chunk, the longest first; `left` rows, this chunk's among them, are to be done."""
        position = {row.id: i for i, row in enumerate(part)}
        rendered = sorted(self.bench.render_each(part, self.config), key=lambda row: len(row.ids), reverse=True)
        for i in range(0, len(rendered), self.batch_size):
            self.bench.stop()
            began = time.perf_counter()
            group = rendered[i : i + self.batch_size]
            batch = collate(group, self.bench.pad_id, weigh(group, self.config.reduction)).to(self.ctx.device)
            found = self.measure(batch).detach().reshape(len(group), values.shape[1]).cpu().numpy()
            if not np.isfinite(found).all():
                odd = next(row.row_id for row, value in zip(group, found, strict=True) if not np.isfinite(value).all())
                raise TrainingError(f"{self.name}: row '{odd}' is measured as a number that is not finite; lower the "
                                    "learning rate of what was trained before, or load the model in fp32")  # fmt: skip
            values[[position[row.row_id] for row in group]] = found
            if not self.told:  # the longest batch is the pilot: the memory that it needs is enough for the others
                whole = (time.perf_counter() - began) * _padded(rendered, self.batch_size) / batch.input_ids.numel()
                tell(not bar.disable, f"{self.name}: {left:,} rows", whole * left / len(part), self.ctx.device)
                self.told = True


def _padded(rendered: Sequence[Rendered], batch_size: int) -> int:
    """Tokens of all batches, padding included; the first row of each is its longest."""
    return sum(len(rendered[i].ids) * len(rendered[i : i + batch_size]) for i in range(0, len(rendered), batch_size))


@dataclass
class _Chunks:
    """A matrix in one .npy file, and beside it an empty file START-DIGEST for each chunk that is finished."""

    folder: Path
    shape: tuple[int, int]
    dtype: np.dtype

    def __post_init__(self) -> None:
        self.file = self.folder / "matrix.npy"
        if self.file.exists():
            held = self.matrix()
            if (held.shape, held.dtype) == (self.shape, self.dtype):
                return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        temporary = self.file.with_suffix(".partial")
        np.lib.format.open_memmap(temporary, "w+", self.dtype, self.shape)  # sparse: only the header is written
        temporary.replace(self.file)

    def matrix(self) -> np.ndarray:
        return np.load(self.file, mmap_mode="r")

    def has(self, start: int, content: str) -> bool:
        return (self.folder / f"{start}-{content}").exists()

    def put(self, start: int, content: str, values: np.ndarray) -> None:
        """Written as a file and not through the map, where a full disk would be a signal and no error."""
        for stale in self.folder.glob(f"{start}-*"):
            stale.unlink()
        offset = self.matrix().offset + start * values[:1].nbytes  # type: ignore[attr-defined]
        with self.file.open("r+b") as file:
            file.seek(offset)
            file.write(values.tobytes())
            file.flush()
            os.fsync(file.fileno())
        (self.folder / f"{start}-{content}").touch()
