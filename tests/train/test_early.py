"""Early checkpoints: what each one holds, Adam's state by name, a training that is not taken twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
from benches import Halt, halt_at, make_bench, make_rows, same_bits
from tiny import tiny_model

from apothecary.models.settings import LoraSettings
from apothecary.train import fit
from apothecary.train.config import TrainConfig
from apothecary.train.early import early
from apothecary.train.method import TrainingMethod
from apothecary.train.warm_up import drawn

ROWS = make_rows("row", 10)
CONFIG = TrainConfig(learning_rate=1e-2, epochs=3, batch_size=4, schedule="linear", warmup_ratio=0.0, weight_decay=0.1,
                     save_every=1, lora=LoraSettings(rank=2, dropout=0.1))  # fmt: skip


def visited(bench, count, rows=ROWS, config=CONFIG):
    """(learning rate, trainable weights, moments) at each checkpoint."""
    found = []
    for point in early(bench, rows, config, count):
        weights = {n: p.detach().clone() for n, p in bench.loaded.model.named_parameters() if p.requires_grad}
        found.append((point.learning_rate, weights, point.moments()))
    return found


class Watched(TrainingMethod):
    """Notes weights and Adam's state by the optimiser's own parameters, after each step."""

    def converged(self, ctx, state):
        optimiser = TRAINER[-1].optimizer
        STEPS.append({n: (p.detach().clone(), *(optimiser.state[p][k].clone() for k in ("exp_avg", "exp_avg_sq")))
                      for n, p in ctx.parameters().items()})  # fmt: skip
        return False


STEPS: list = []
TRAINER: list = []


@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_each_holds_the_weights_and_moments_of_its_step(tmp_path, monkeypatch, parameters):
    """Weight decay parts the optimiser's parameters in two groups, so that its numbers are not the model's order."""
    config = replace(CONFIG, parameters=parameters)
    found = visited(make_bench(tmp_path / "early"), 3, config=config)
    init = fit.MethodTrainer.__init__
    monkeypatch.setattr(fit.MethodTrainer, "__init__", lambda self, **k: (TRAINER.append(self), init(self, **k))[1])
    STEPS.clear()
    watched = Watched()
    watched.kind, watched.name = "align", "watched"
    fit.train(make_bench(tmp_path / "watched"), watched, ROWS, replace(config, save_every=0), name="selector")
    assert len(STEPS) == 9 and len(found) == 3
    for k, (rate, weights, moments) in enumerate(found):
        step = STEPS[3 * k + 2]
        assert rate == pytest.approx(1e-2 * (1 - (3 * k + 1) / 9)), "the mean of three steps of a falling rate"
        assert same_bits(weights, {n: parts[0] for n, parts in step.items()})
        for which in (0, 1):
            assert same_bits({n: m[which] for n, m in moments.items()}, {n: s[1 + which] for n, s in step.items()})
    assert not same_bits(found[0][1], found[1][1])


def test_they_stand_at_equal_distances_and_the_last_at_the_end(tmp_path):
    bench = make_bench(tmp_path)
    numbers = [int(point.folder.name.split("-")[1]) for point in early(bench, ROWS, CONFIG, 2)]
    assert numbers == [4, 8], "of 9 steps, rounded to a multiple"
    numbers = [int(point.folder.name.split("-")[1]) for point in early(make_bench(tmp_path / "b"), ROWS[:3], CONFIG, 5)]
    assert numbers == [1, 2, 3], "a step each, and none beyond the training"


@pytest.mark.parametrize(("settings", "count", "expected"), [
    ({"epochs": 0.4}, 4, [1]),  # 0.4 of 3 steps: rounded up, as in an ordinary training
    ({"epochs": 0.3}, 4, [1]),  # 0.9 of a step: one
    ({"max_steps": 7}, 4, [1, 2, 3, 4]), ({"max_steps": 11}, 2, [5, 10]), ({"max_steps": 2}, 3, [1, 2]),
])  # fmt: skip
def test_no_step_is_taken_that_was_not_asked_for(tmp_path, settings, count, expected):
    config = replace(CONFIG, batch_size=4 if "max_steps" in settings else 5, **settings)
    points = early(make_bench(tmp_path), ROWS, config, count)
    assert [int(point.folder.name.split("-")[1]) for point in points] == expected


def test_killed_it_goes_on_and_trains_nothing_twice(tmp_path):
    whole, rows = visited(make_bench(tmp_path / "whole"), 3), len(ROWS)  # each row is measured before the steps
    for call, left in ((2, 9), (8, 3)):  # before the first checkpoint, after the second
        folder = tmp_path / str(call)
        with pytest.raises(Halt):
            visited(make_bench(folder, stop=halt_at(rows + call)), 3)
        calls = []
        again = visited(make_bench(folder, stop=lambda calls=calls: calls.append(0)), 3)
        assert len(calls) == rows + left
        assert all(a[0] == b[0] and same_bits(a[1], b[1]) for a, b in zip(again, whole, strict=True))
    calls.clear()
    visited(make_bench(folder, tiny_model(), stop=lambda: calls.append(0)), 3)
    assert len(calls) == rows, "a finished training is only looked at"


def test_rows_are_drawn_by_the_seed():
    some = [row.id for row in drawn(ROWS, 0.5, 0)]
    assert len(some) == 5 and some == [row.id for row in drawn(ROWS, 0.5, 0)] != [row.id for row in drawn(ROWS, 0.5, 1)]
    assert len(drawn(ROWS, 0.01, 0)) == 1 and {row.id for row in drawn(ROWS, 1.0, 3)} == {row.id for row in ROWS}
