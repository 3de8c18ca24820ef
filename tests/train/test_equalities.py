"""Normalisers and accumulation: how a step is divided does not change it (design promises; float64 throughout)."""

from __future__ import annotations

import pytest
import torch
from benches import Recorder, float64_model, furthest, make_batch, make_bench, make_context, make_rows, snapshot
from tiny import PAD

from apothecary.align.sft import Sft
from apothecary.align.vaccine import Vaccine
from apothecary.finetune.security_vectors import VectorTraining
from apothecary.models.adapters import adapter_parameters
from apothecary.train.batch import collate
from apothecary.train.config import TrainConfig
from apothecary.train.fit import TRAINED, train

METHODS = {
    "sft": (lambda: Sft(), "full"),
    "vaccine": (lambda: Vaccine(norm_scope="sample"), "full"),
    "vectors": (lambda: VectorTraining(lamb=1.0, target_nll=0.0), "lora"),  # an auxiliary term
}


def run(folder, method, parameters, accumulation, **config):
    """12 rows in batches of 8: one full and one incomplete (4 rows) an epoch."""
    bench = make_bench(folder, float64_model())
    recorder = Recorder(method, to_float64=True)
    options = {"max_steps": 3, "batch_size": 8, "learning_rate": 1e-2, "warmup_ratio": 0.0, "save_every": 0,
               "log_every": 1, "aux_batch_size": 5} | config  # fmt: skip
    config = TrainConfig(accumulation=accumulation, parameters=parameters, **options)
    result = train(bench, recorder, make_rows("row", 12), config)
    model = bench.loaded.model
    final = snapshot(model) if parameters == "full" else dict(adapter_parameters(model, TRAINED))
    return recorder, {name: p.detach() for name, p in final.items()}, result


@pytest.mark.parametrize("reduction", ["token_mean", "sample_mean"])
@pytest.mark.parametrize("method", METHODS)
def test_1x8_equals_2x4_equals_8x1(tmp_path, method, reduction):
    make, parameters = METHODS[method]
    once, weights, result = run(tmp_path / "1", make(), parameters, 1, reduction=reduction)
    assert sorted(sum(len(b.row_ids) for b in step) for step in once.batches[:2]) == [4, 8]
    for accumulation in (2, 8):
        other, others, again = run(tmp_path / str(accumulation), make(), parameters, accumulation, reduction=reduction)
        assert [len(step) for step in other.batches] == [accumulation] * 3
        for a, b in zip(once.gradients, other.gradients, strict=True):
            assert furthest({n: g for n, g in b.items() if g.abs().max() > 1e-12},
                            {n: a[n] for n, g in b.items() if g.abs().max() > 1e-12}) < 1e-9  # fmt: skip
        assert furthest(others, weights) < 1e-9
        for a, b in zip(result.history, again.history, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-6), "logged in fp32"
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-9)
        for a, b in zip(once.logged, other.logged, strict=True):
            assert a == pytest.approx(b, rel=1e-9)
    if method == "vectors":
        assert min(step["benign_kl"] for step in once.logged[1:]) > 1e-4, "the auxiliary term is at work"


@pytest.mark.parametrize("reduction", ["token_mean", "sample_mean"])
def test_the_normaliser_counts_the_whole_step(tmp_path, reduction):
    recorder, _, _ = run(tmp_path, Sft(), "full", 4, reduction=reduction)
    for step in recorder.batches:
        supervised = sum(int((b.labels[:, 1:] >= 0).sum()) for b in step)
        rows = sum(len(b.row_ids) for b in step)
        assert {b.normaliser for b in step} == {float(supervised if reduction == "token_mean" else rows)}


def test_every_row_once_an_epoch_and_the_same_rows_in_a_step_at_any_accumulation(tmp_path):
    orders = []
    for accumulation in (1, 4):
        recorder, _, _ = run(tmp_path / str(accumulation), Sft(), "full", accumulation, max_steps=4)
        orders.append([{row for b in step for row in b.row_ids} for step in recorder.batches])
    assert orders[0] == orders[1]
    assert orders[0][0] | orders[0][1] == {f"row{i}" for i in range(12)} == orders[0][2] | orders[0][3]
    assert orders[0][:2] != orders[0][2:], "the second epoch is mixed anew"


def test_the_auxiliary_batch_is_divided_over_the_step(tmp_path):
    """One global batch of a role for each step, whatever the accumulation; every row once a round."""

    def drawn(window, per="micro"):
        ctx = make_context(make_bench(tmp_path), ("benign",), aux_batch_size=3)
        steps = []
        for _ in range(3):
            ctx.begin_step(window)
            parts = []
            for micro in range(window):
                ctx.begin_micro_step(micro)
                parts.append(ctx.aux("benign", per))
            steps.append(parts)
        return steps

    once, divided = drawn(1), drawn(4)
    for (whole,), parts in zip(once, divided, strict=True):
        assert [row for b in parts for row in b.row_ids] == list(whole.row_ids)
        assert {b.normaliser for b in parts} == {whole.normaliser}
        assert any(not b.row_ids for b in parts), "fewer rows than parts: one part is empty"
    assert sorted(row for (b,) in once for row in b.row_ids) == [f"benign{i}" for i in range(7)]
    for parts in drawn(2, per="step"):
        assert parts[0].row_ids == parts[1].row_ids and len(parts[0].row_ids) in (1, 3)


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_share_contributes_exactly_zero(tmp_path, method):
    make, _ = METHODS[method]
    bench = make_bench(tmp_path, float64_model())
    ctx = make_context(bench, ("benign",), aux_batch_size=1)
    ctx.begin_step(4)
    ctx.begin_micro_step(3)  # the benign batch of one row goes to micro-batch 0
    (row,) = bench.render(make_rows("row", 1), TrainConfig())
    empty = collate([], PAD, 17.0, blank=row)
    assert empty.row_ids == () and int((empty.labels >= 0).sum()) == 0
    instance = make()
    loss = instance.step(ctx, empty, instance.init(ctx))
    assert loss.item() == 0.0
    grads = [p.grad for p in ctx.model.parameters() if p.grad is not None]
    assert grads and all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_vaccine_over_a_batch_is_the_sum_of_independent_half_batch_steps(tmp_path):
    recorder, _, _ = run(tmp_path / "run", Vaccine(), "full", 2, max_steps=1)
    (halves,) = recorder.batches
    assert [len(b.row_ids) for b in halves] == [2, 2]
    parts = []
    for half in halves:
        ctx = make_context(make_bench(tmp_path, float64_model()), parameters="full")
        Vaccine().step(ctx, half, {})
        parts.append({name: p.grad for name, p in ctx.model.named_parameters()})
    summed = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    big = {name for name, g in summed.items() if g.abs().max() > 1e-12}
    assert furthest({n: recorder.gradients[0][n] for n in big}, {n: summed[n] for n in big}) < 1e-9
    whole, _, _ = run(tmp_path / "whole", Vaccine(), "full", 1, max_steps=1)
    gap = furthest({n: whole.gradients[0][n] for n in big}, {n: summed[n] for n in big})
    assert gap > 1e-3, "the paper's norm spans the micro-batch, so 1x8 differs from 2x4"


def test_sample_mean_weighs_rows_and_token_mean_tokens(tmp_path):
    bench = make_bench(tmp_path, float64_model())
    rows = make_rows("row", 5)
    by_row = make_context(bench).per_sample_loss(make_batch(bench, rows))
    tokens = make_batch(bench, rows).tokens_B.double()
    assert len(set(tokens.tolist())) > 1
    for reduction, expected in (("token_mean", by_row @ tokens / tokens.sum()), ("sample_mean", by_row.mean())):
        ctx = make_context(bench, reduction=reduction)
        assert ctx.loss(make_batch(bench, rows, reduction)).item() == pytest.approx(expected.item(), rel=1e-12)
