"""Gradient scores: central differences against one backward per row, and the check of their step."""

from __future__ import annotations

import logging

import pytest
import torch
from benches import float64_model, furthest, make_batch, make_bench, make_context, make_rows, same_bits, snapshot
from tiny import tiny_model

from apothecary.errors import TrainingError
from apothecary.models.adapters import add_adapter
from apothecary.models.settings import LoraSettings
from apothecary.train import scores
from apothecary.train.scores import agreement, central_scores, checked_step, exact_scores, pool_scores, probe

EVIDENCE = pytest.mark.evidence("curate/pharmacist", "definition")


def scene(tmp_path, model=None, **config):
    bench = make_bench(tmp_path, model or float64_model())
    ctx = make_context(bench, **config)
    return bench, ctx, ctx.grads(make_batch(bench, bench.aux["validation"]))


def lora(model):
    """An adapter that has moved."""
    model = add_adapter(model, "trained", LoraSettings(), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    return model


@EVIDENCE
@pytest.mark.parametrize("adapt", [lora, lambda model: model])
@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_central_differences_agree_with_exact_scores_on_16_rows(tmp_path, adapt, kind):
    bench, ctx, direction = scene(tmp_path, adapt(tiny_model("llama")))
    batch, before = make_batch(bench, make_rows("row", 16)), snapshot(ctx.model)
    central, exact = (f(ctx, batch, direction, kind) for f in (central_scores, exact_scores))
    assert torch.corrcoef(torch.stack([central, exact]))[0, 1] > 0.999
    assert (central - exact).abs().max() < 0.01 * exact.abs().max()
    assert set(central.argsort()[-8:].tolist()) == set(exact.argsort()[-8:].tolist())
    assert same_bits(before, snapshot(ctx.model)) and all(p.grad is None for p in ctx.model.parameters())


@pytest.mark.parametrize("compute", [central_scores, exact_scores])
def test_the_sum_is_the_mean_times_the_tokens(tmp_path, compute):
    bench, ctx, direction = scene(tmp_path)
    batch = make_batch(bench, make_rows("row", 5))
    mean, total = (compute(ctx, batch, direction, kind) for kind in ("mean", "sum"))
    torch.testing.assert_close(total, mean * batch.tokens_B, rtol=1e-6, atol=1e-9)
    assert len(set(batch.tokens_B.tolist())) > 1


def test_exact_scores_take_each_row_alone_and_without_padding(tmp_path, monkeypatch):
    """A backward through the whole batch for each of its rows would cost its square."""
    bench, ctx, direction = scene(tmp_path)
    batch, seen = make_batch(bench, make_rows("row", 5)), []
    forward = ctx.forward
    monkeypatch.setattr(ctx, "forward", lambda part, **options: seen.append(part) or forward(part, **options))
    exact_scores(ctx, batch, direction, "mean")
    assert [part.row_ids for part in seen] == [(name,) for name in batch.row_ids]
    assert [part.input_ids.numel() for part in seen] == batch.attention_mask.sum(1).tolist()
    assert len({part.input_ids.numel() for part in seen}) > 1, "rows of different lengths"
    assert {part.normaliser for part in seen} == {batch.normaliser}


def test_no_direction_gives_zero_and_passes_the_check(tmp_path):
    bench, ctx, direction = scene(tmp_path)
    zeros = {name: torch.zeros_like(p) for name, p in direction.items()}
    batch = make_batch(bench, make_rows("row", 3))
    assert torch.equal(central_scores(ctx, batch, zeros, "mean"), torch.zeros(3))
    assert checked_step(ctx, batch, zeros, "mean") == scores.STEPS[0]


def test_the_step_that_agrees_best_is_taken_and_told(tmp_path, monkeypatch, caplog):
    bench, ctx, direction = scene(tmp_path)
    batch = make_batch(bench, make_rows("row", 16))
    monkeypatch.setattr(scores, "STEPS", (30.0, 1e-3, 3.0))
    with caplog.at_level(logging.INFO):
        assert checked_step(ctx, batch, direction, "mean") == 1e-3
    assert "step 0.001, correlation 1.000000 with exact scores on 16 rows" in caplog.text


def test_where_no_step_agrees_the_way_out_is_named(tmp_path, monkeypatch):
    bench, ctx, direction = scene(tmp_path)
    monkeypatch.setattr(scores, "STEPS", (30.0, 100.0))
    with pytest.raises(TrainingError, match=r"expected 0\.999 or more; set gradient: exact"):
        checked_step(ctx, make_batch(bench, make_rows("row", 16)), direction, "mean")
    pool_scores(bench, ctx, make_rows("row", 16), direction, "mean", "exact")  # asks for no step


@EVIDENCE
@pytest.mark.parametrize("found", [torch.zeros(16), torch.full((16,), torch.nan), torch.full((16,), torch.inf)])
def test_differences_that_vanish_or_are_not_finite_do_not_pass(tmp_path, monkeypatch, found):
    """As in half precision, where a small step moves no weight."""
    bench, ctx, direction = scene(tmp_path)
    batch = make_batch(bench, make_rows("row", 16))
    monkeypatch.setattr(scores, "central_scores", lambda *_: found)
    with pytest.raises(TrainingError, match=r"correlate only -1\.0000 with exact scores"):
        checked_step(ctx, batch, direction, "mean")
    assert agreement(torch.full((2,), torch.nan), torch.full((2,), 1.0)) == -1.0


@EVIDENCE
@pytest.mark.parametrize("n", [1, 2])
def test_rows_that_cannot_be_told_apart_are_checked_by_their_size(tmp_path, n):
    assert agreement(torch.full((n,), 3.0), torch.full((n,), 2.0)) == pytest.approx(0.5)
    bench, ctx, direction = scene(tmp_path)
    batch = make_batch(bench, [make_rows("row", 1)[0]] * n)
    assert checked_step(ctx, batch, direction, "mean") in scores.STEPS


def test_sixteen_rows_are_drawn_from_the_whole_pool(tmp_path):
    bench, ctx, _ = scene(tmp_path)
    rows = make_rows("row", 200)
    drawn = [int(name.removeprefix("row")) for name in probe(bench, ctx, rows).row_ids]
    assert len(set(drawn)) == 16 and min(drawn) < 60 and max(drawn) > 140
    assert len(probe(bench, ctx, rows[:5]).row_ids) == 5


@pytest.mark.parametrize("gradient", ["central", "exact"])
def test_a_pool_is_scored_by_id(tmp_path, gradient):
    bench, ctx, direction = scene(tmp_path)
    rows = make_rows("row", 20)
    found = pool_scores(bench, ctx, rows, direction, "sum", gradient)
    expected = exact_scores(ctx, make_batch(bench, rows), direction, "sum")
    assert list(found) == [row.id for row in rows]
    values = torch.tensor(list(found.values()), dtype=torch.float64)
    assert furthest({"s": values}, {"s": expected}) < (1e-9 if gradient == "exact" else 1e-3)
