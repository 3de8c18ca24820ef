"""Loops that can be watched: every item once, a stop before each, one estimate."""

from __future__ import annotations

import logging

import pytest
from benches import Halt, halt_at, make_bench, make_rows

from apothecary.train import progress
from apothecary.train.config import TrainConfig
from apothecary.train.fit import train
from apothecary.train.method import TrainingMethod
from apothecary.train.progress import watched


def test_every_item_comes_once_and_the_bench_may_stop_before_each(tmp_path):
    assert list(watched(make_bench(tmp_path), iter("abc"), 3, "letters")) == ["a", "b", "c"]
    seen = []
    with pytest.raises(Halt):
        for item in watched(make_bench(tmp_path, stop=halt_at(2)), "abc", 3, "letters"):
            seen.append(item)
    assert seen == ["a", "b"]


def test_a_long_loop_is_told_once_after_its_first_item(tmp_path, monkeypatch, caplog, capsys):
    ticks = iter((0.0, 60.0, 60.0, 120.0))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(ticks))
    with caplog.at_level(logging.INFO, "apothecary.train.progress"):
        for item in watched(make_bench(tmp_path, progress=True), range(2), 30, "turns", "step"):
            assert len(caplog.records) == item
    assert "turns: 30 steps, about 30.0 min and" in caplog.records[0].message
    assert "turns: 30 steps" in capsys.readouterr().out


def test_a_training_tells_after_its_first_step_what_the_others_take(tmp_path, monkeypatch, caplog):
    def told(limit):
        monkeypatch.setattr(progress, "WORTH_TELLING", limit)
        caplog.clear()
        with caplog.at_level(logging.INFO, "apothecary.train.progress"):
            train(make_bench(tmp_path / str(limit)), TrainingMethod(), make_rows("align", 8),
                  TrainConfig(batch_size=2, max_steps=4, save_every=0))  # fmt: skip
        return [record.message for record in caplog.records]

    (message,) = told(0.0)
    assert "3 more steps, about 0.0 min and" in message and "GiB of cpu memory" in message
    assert told(1e9) == []
