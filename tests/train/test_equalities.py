"""Normalisers and accumulation: how a step is divided does not change it (design promises; float64 throughout)."""

from __future__ import annotations

import pytest
import torch
from benches import float64_model, furthest, largest, make_batch, make_bench, make_context, make_rows, snapshot
from cases import CASES, Case, Seeded, params, seed_share
from tiny import PAD

from apothecary.models.adapters import adapter_parameters, add_adapter
from apothecary.train.batch import collate
from apothecary.train.config import TrainConfig
from apothecary.train.fit import TRAINED, train

SFT = CASES["sft full"]


def run(folder, case: Case, accumulation, **changes):
    """12 rows in batches of 8: one full and one incomplete (4 rows) an epoch."""
    bench = case.bench(folder, float64_model)
    recorder = Seeded(case.make())
    options = {"max_steps": 3, "batch_size": 8, "learning_rate": 1e-2, "warmup_ratio": 0.0, "save_every": 0,
               "log_every": 1, "aux_batch_size": 5, **case.settings, **changes}  # fmt: skip
    config = TrainConfig(accumulation=accumulation, parameters=case.parameters, **options)
    result = train(bench, recorder, make_rows("row", 12), config)
    model = bench.loaded.model
    final = snapshot(model) if case.parameters == "full" else dict(adapter_parameters(model, TRAINED))
    return recorder, {name: p.detach() for name, p in final.items()}, result


@pytest.mark.parametrize("reduction", ["token_mean", "sample_mean"])
@pytest.mark.parametrize("case", params("accumulation", linear=True))
def test_1x8_equals_2x4_equals_8x1(tmp_path, case, reduction):
    once, weights, result = run(tmp_path / "1", case, 1, reduction=reduction)
    assert sorted(sum(len(b.row_ids) for b in step) for step in once.batches[:2]) == [4, 8]
    for accumulation in (2, 8):
        other, others, again = run(tmp_path / str(accumulation), case, accumulation, reduction=reduction)
        assert [len(step) for step in other.batches] == [accumulation] * 3
        assert all(largest(a, b) < 1e-9 for a, b in zip(once.gradients, other.gradients, strict=True))
        assert furthest(others, weights) < 1e-9
        for a, b in zip(result.history, again.history, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-6), "logged in fp32"
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-9)
        for a, b in zip(once.logged, other.logged, strict=True):
            assert a == pytest.approx(b, rel=1e-9)
    if case.at_work:
        assert min(step[case.at_work] for step in once.logged[1:]) > 1e-4, "the auxiliary term is at work"


@pytest.mark.parametrize("case", params("accumulation", linear=False))
def test_a_step_is_the_sum_of_independent_micro_batches(tmp_path, case):
    """For methods that are defined on one micro-batch; see a method's own tests for how 1x8 differs from 2x4."""
    recorder, _, _ = run(tmp_path, case, 2, max_steps=1)
    (halves,) = recorder.batches
    assert [len(b.row_ids) for b in halves] == [2, 2]
    parts = []
    for micro, half in enumerate(halves):
        ctx, method, state = alone(tmp_path / str(micro), case)
        ctx.begin_step(2)
        ctx.begin_micro_step(micro)
        seed_share(ctx, 0)
        method.step(ctx, half, state)
        parts.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in ctx.parameters().items()})
    summed = {name: parts[0][name] + parts[1][name] for name in recorder.gradients[0]}
    assert largest(recorder.gradients[0], summed) < 1e-9


def alone(folder, case: Case, **changes):
    """(context, method, state) over a new model, outside a training."""
    bench = case.bench(folder, float64_model)
    config = {"aux_batch_size": 5, **case.settings, **changes}
    if case.parameters == "lora":
        bench.loaded.model = add_adapter(bench.loaded.model, TRAINED, TrainConfig().lora, 0)  # type: ignore
    method = case.make()
    ctx = make_context(bench, method.needs.roles, parameters=case.parameters, **config)
    ctx.model.train()
    state = method.init(ctx)
    ctx.model.double()
    return ctx, method, state


@pytest.mark.parametrize("case", params("accumulation"))
def test_an_empty_share_contributes_exactly_zero(tmp_path, case):
    ctx, method, state = alone(tmp_path, case, aux_batch_size=1)
    ctx.begin_step(4)
    ctx.begin_micro_step(2)  # auxiliary batches of one row go to micro-batch 0
    bench = make_bench(tmp_path, float64_model())
    (row,) = bench.render(make_rows("row", 1), TrainConfig())
    empty = collate([], PAD, 17.0, blank=row)
    assert empty.row_ids == () and int((empty.labels >= 0).sum()) == 0
    assert method.step(ctx, empty, state).item() == 0.0
    grads = [p.grad for p in ctx.model.parameters() if p.grad is not None]
    assert grads and all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("reduction", ["token_mean", "sample_mean"])
def test_the_normaliser_counts_the_whole_step(tmp_path, reduction):
    recorder, _, _ = run(tmp_path, SFT, 4, reduction=reduction)
    for step in recorder.batches:
        supervised = sum(int((b.labels[:, 1:] >= 0).sum()) for b in step)
        rows = sum(len(b.row_ids) for b in step)
        assert {b.normaliser for b in step} == {float(supervised if reduction == "token_mean" else rows)}


def test_every_row_once_an_epoch_and_the_same_rows_in_a_step_at_any_accumulation(tmp_path):
    orders = []
    for accumulation in (1, 4):
        recorder, _, _ = run(tmp_path / str(accumulation), SFT, accumulation, max_steps=4)
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


def test_the_radius_of_vaccine_spans_the_micro_batch(tmp_path):
    (whole, _, _), (halves, _, _) = (run(tmp_path / str(n), CASES["vaccine"], n, max_steps=1) for n in (1, 2))
    assert largest(halves.gradients[0], whole.gradients[0]) > 1e-3, "so 1x8 differs from 2x4"


def test_sample_mean_weighs_rows_and_token_mean_tokens(tmp_path):
    bench = make_bench(tmp_path, float64_model())
    rows = make_rows("row", 5)
    by_row = make_context(bench).per_sample_loss(make_batch(bench, rows))
    tokens = make_batch(bench, rows).tokens_B.double()
    assert len(set(tokens.tolist())) > 1
    for reduction, expected in (("token_mean", by_row @ tokens / tokens.sum()), ("sample_mean", by_row.mean())):
        ctx = make_context(bench, reduction=reduction)
        assert ctx.loss(make_batch(bench, rows, reduction)).item() == pytest.approx(expected.item(), rel=1e-12)
