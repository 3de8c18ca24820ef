"""IFD: keep rows whose prompt helps little to predict the answer.  Li et al. 2023, arXiv 2308.12032.

    IFD(x, y) = l(y | x) / l(y),      l: mean negative log-likelihood over the answer's tokens

Rows with a ratio above 1, whose prompt misleads, are dropped; of the others the largest are kept (5 to 15 % in the
paper).  The scoring model is first trained for one epoch on about 1000 diverse rows.

Cost: N forward passes and a k-means for the diverse rows, their epoch of training, then 2 N forward passes; k-means
holds the N x D embeddings in memory.  With `warmup_rows: 0` (the authors' second version) 2 N forward passes.

l(y): the authors' code (tianyi-lab/Cherry_LLM) scores "### Response:" + y, which is its template's opening of an answer
without instruction and preamble.  In a chat template that is the opening of an assistant's turn, after bos where the
template has one: `alone: header`.  `alone: empty_turn` keeps the rest of the template around an empty user turn.

Deviations from that code: the answer is found by construction, not by rfind and re-encoding, and has the same token ids
in both passes; its eos counts.  Well-learnt refusals have l(y) near 0 and any ratio: l(y) is taken as at least `floor`,
so that what needs no prompt counts as easy.  Diverse rows: k-means on the mean last hidden state of the prompt as
there, then in turn one random row of each cluster; there 10 of each, from the middle half of the prompts'
perplexities.  Their training, at full parameters with learning rate 2e-5, batch 128 and warm-up 0.03, suits 7B models;
our default is a LoRA run.
"""

from __future__ import annotations

import math
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from apothecary.errors import expect
from apothecary.registry import register
from apothecary.train.config import TrainConfig
from apothecary.train.method import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from apothecary.data.rows import Row
    from apothecary.train.batch import Batch
    from apothecary.train.context import StepContext
    from apothecary.train.workbench import Workbench


@register("curate", "ifd", paper="2308.12032")
@dataclass(frozen=True)
class Ifd(Selector):
    """Hyper-parameters of IFD."""

    direction: Literal["high", "low"] = "high"  # which ratios up to 1 are kept (paper: high)
    alone: Literal["header", "empty_turn"] = "header"  # what stands before the answer in l(y) (authors' code: header)
    floor: float = 0.1  # nats per token, > 0; least l(y) to divide by (ours; towards 0 it is the authors' division)
    warmup_rows: int = 1000  # rows that the scoring model is first trained on (paper); 0: it scores as it is
    clusters: int = 100  # >= 1, of k-means among the prompts (authors' code)
    warmup: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=1.0))  # also says which rows are too long
    batch_size: int = 32  # rows, >= 1; changes nothing but speed and memory (ours)

    def __post_init__(self) -> None:
        expect(self, "a finite number above 0", lambda x: x > 0 and math.isfinite(x), "floor")
        expect(self, "at least 0", lambda n: n >= 0, "warmup_rows")
        expect(self, "at least 1", lambda n: n >= 1, "clusters", "batch_size")

    def score(self, bench: Workbench, rows: Sequence[Row]) -> dict[str, float]:
        """The ratio, negated if low is preferred; -inf above 1, and for a row that is dropped for its length."""
        from apothecary.data.chat import opening_ids, prompt_ids
        from apothecary.data.rows import by_id
        from apothecary.train.sweep import sweep
        from apothecary.train.warm_up import scoring, warm_up

        bench.require(self)
        tokenizer = bench.loaded.tokenizer
        opening = opening_ids(tokenizer) if self.alone == "header" else prompt_ids([("user", "")], tokenizer)
        rows = by_id(rows)
        warm_up(bench, self.diverse(bench, rows), self.warmup, float(self.warmup_rows > 0))
        ctx = scoring(bench, self.warmup)

        def measure(batch: Batch) -> Tensor:
            return self.ratio(ctx, batch, without_prompt(batch, opening, bench.pad_id))

        ratios = sweep(bench, ctx, rows, measure, self.warmup, batch_size=self.batch_size)
        sign = 1.0 if self.direction == "high" else -1.0
        return {name: sign * ratio if 0 <= ratio <= 1 else -math.inf for name, ratio in ratios.items()}

    def ratio(self, ctx: StepContext, batch: Batch, bare: Batch) -> Tensor:
        """IFD of each row, [B]; `bare` holds the same answers without their prompts."""
        return ctx.per_sample_loss(batch) / ctx.per_sample_loss(bare).clamp_min(self.floor)

    def diverse(self, bench: Workbench, rows: Sequence[Row]) -> Sequence[Row]:
        """`warmup_rows` rows: a random one of each cluster of prompts, then a second of each, and so on."""
        from apothecary.data.rows import Chosen

        if not 0 < self.warmup_rows < len(rows):
            return rows
        cluster = self.clustered(bench, rows)
        shuffled = random.Random(f"{bench.seed}:diverse").sample(sorted(cluster), len(cluster))
        taken, turn = Counter[int](), {}
        for i in shuffled:
            turn[i] = taken[cluster[i]]
            taken[cluster[i]] += 1
        return Chosen(rows, sorted(sorted(shuffled, key=turn.__getitem__)[: self.warmup_rows]))

    def clustered(self, bench: Workbench, rows: Sequence[Row]) -> dict[int, int]:
        """The cluster of each row's prompt, by position; rows that are dropped for their length are left out."""
        import numpy as np
        from scipy.cluster.vq import kmeans2

        from apothecary.train.embeddings import embed
        from apothecary.train.warm_up import scoring

        embedding_ND = embed(bench, scoring(bench, self.warmup), rows, self.warmup, "prompts", "prompt",
                             normalise=False, batch_size=self.batch_size)  # fmt: skip
        usable = np.flatnonzero(~np.isnan(embedding_ND[:, 0]))
        if not len(usable):
            return {}
        with warnings.catch_warnings():  # clusters may be empty where prompts are equal
            warnings.simplefilter("ignore")
            _, labels = kmeans2(embedding_ND[usable], min(self.clusters, len(usable)), minit="++",
                                seed=bench.seed)  # type: ignore[call-arg]  # fmt: skip
        return dict(zip(usable.tolist(), labels.tolist(), strict=True))


def without_prompt(batch: Batch, opening: Sequence[int], pad_id: int) -> Batch:
    """The batch with `opening` in place of each row's prompt."""
    from apothecary.data.chat import IGNORE, Rendered
    from apothecary.train.batch import collate

    answers = [ids[labels != IGNORE].tolist() for ids, labels in zip(batch.input_ids, batch.labels, strict=True)]
    bare = [Rendered(row_id, (*opening, *answer), len(opening))
            for row_id, answer in zip(batch.row_ids, answers, strict=True)]  # fmt: skip
    return collate(bare, pad_id, batch.normaliser).to(batch.input_ids.device)
