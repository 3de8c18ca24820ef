"""Pools that need not fit in memory: rows rendered on demand, and a warm-up that reads its own rows alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from benches import make_bench, make_rows, same_bits, snapshot

from apothecary.data.rows import Row, by_id
from apothecary.errors import DataError, OverLong
from apothecary.train.config import TrainConfig
from apothecary.train.fit import train
from apothecary.train.method import TrainingMethod
from apothecary.train.on_demand import OnDemand
from apothecary.train.warm_up import NAME, scoring, warm_up

LONG = Row("long", (("user", "tell me " * 40),), "no")


class Watched(Sequence):
    """Rows that note who reads them."""

    def __init__(self, rows):
        self.rows, self.read = rows, []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.read.append(i)
        return self.rows[i]


def test_rows_are_rendered_as_ever(tmp_path):
    bench, rows, config = make_bench(tmp_path), make_rows("row", 9), TrainConfig()
    pool = OnDemand(bench, rows, config)
    assert list(pool) == bench.render(rows, config) and pool[2:4] == bench.render(rows[2:4], config)
    assert list(pool.lengths) == [len(row.ids) for row in pool]


def test_long_rows_are_left_out_or_refused_and_ids_stay_with_their_scores(tmp_path):
    bench, rows = make_bench(tmp_path), [LONG, *make_rows("row", 3)]
    pool = OnDemand(bench, rows, TrainConfig(max_length=40, over_long="drop"))
    assert pool.ids() == ["row0", "row1", "row2"] and pool[0].row_id == "row0"
    assert pool.scores(torch.arange(3.0)) == {"long": float("-inf"), "row0": 0.0, "row1": 1.0, "row2": 2.0}
    with pytest.raises(OverLong):
        OnDemand(bench, rows, TrainConfig(max_length=40))
    with pytest.raises(DataError, match="no rows to train on"):
        OnDemand(bench, [LONG], TrainConfig(max_length=40, over_long="drop"))


def test_training_on_demand_is_training(tmp_path):
    rows, config, after = make_rows("row", 9), TrainConfig(epochs=2, batch_size=4, save_every=0), []
    for folder, on_demand in (("a", False), ("b", True)):
        bench = make_bench(tmp_path / folder)
        result = train(bench, TrainingMethod(), OnDemand(bench, rows, config) if on_demand else rows, config)
        after.append((snapshot(bench.loaded.model), result.history, result.metrics))
    assert same_bits(after[0][0], after[1][0]) and after[0][1:] == after[1][1:]


def test_a_warm_up_reads_the_rows_that_it_trains_on_and_no_other(tmp_path):
    bench, rows = make_bench(tmp_path), Watched(make_rows("row", 40))
    warm_up(bench, rows, TrainConfig(epochs=1, batch_size=4, save_every=0), 0.25)
    assert len(set(rows.read)) == 10
    assert not bench.loaded.model.training


@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_without_a_share_the_model_stays_as_it_was(tmp_path, parameters):
    bench, rows = make_bench(tmp_path), Watched(make_rows("row", 8))
    before = snapshot(bench.loaded.model)
    config = TrainConfig(parameters=parameters, reduction="sample_mean", precision="bf16")
    warm_up(bench, rows, config, 0.0)
    assert rows.read == []
    ctx = scoring(bench, config)
    assert (ctx.config.reduction, ctx.config.precision) == ("token_mean", "fp32")
    learning = ctx.parameters()
    assert learning and all((f".{NAME}." in name) == (parameters == "lora") for name in learning)
    if parameters == "full":
        assert same_bits(before, snapshot(bench.loaded.model))


def test_the_order_of_ids_is_the_same_for_every_order_of_the_pool():
    rows = make_rows("row", 12)
    assert list(by_id(rows)) == list(by_id(rows[::-1])) == sorted(rows, key=lambda row: row.id)
