"""Vaccine: the properties of methods.md 4.2, and two steps against independent maths."""

from __future__ import annotations

import pytest
import torch
from benches import (
    Recorder,
    central_slope,
    count_hooks,
    float64_model,
    furthest,
    make_batch,
    make_bench,
    make_context,
    make_rows,
    parts,
    random_way,
    same_bits,
    snapshot,
    working_lora,
)
from reference import vaccine as reference
from tiny import FAMILIES, HIDDEN, LAYERS, tiny_model

from apothecary.align.sft import Sft
from apothecary.align.vaccine import Vaccine
from apothecary.errors import ConfigError
from apothecary.models.adapters import add_adapter
from apothecary.models.anatomy import attention_blocks
from apothecary.models.settings import LoraSettings, ModelConfig
from apothecary.train.config import TrainConfig
from apothecary.train.drift import worst_drift
from apothecary.train.fit import fit, train

SHAPE = (LAYERS, 4)


def scene(tmp_path, model=None, n=4, **config):
    bench = make_bench(tmp_path, model)
    return make_context(bench, **config), make_batch(bench, make_rows("row", n))


def gradient(ctx, method, batch):
    ctx.model.zero_grad()
    loss = method.step(ctx, batch, {})
    return loss, {name: p.grad.clone() for name, p in ctx.parameters().items()}


@pytest.mark.parametrize("rho", [0.1, 2.0, 50.0])
@pytest.mark.evidence("align/vaccine", "definition")
def test_the_perturbation_has_norm_rho(tmp_path, rho):
    ctx, batch = scene(tmp_path)
    grads = ctx.hidden_grads(batch)
    eps = Vaccine(rho=rho).perturbation(ctx, batch)
    assert sum(e.square().sum() for e in eps.values()).sqrt().item() == pytest.approx(rho, rel=1e-5)
    scale = grads[0].norm() / eps[0].norm()
    assert all(torch.allclose(scale * eps[i], grads[i], rtol=1e-4) for i in grads), "one scale for all layers"
    by_row = Vaccine(rho=rho, norm_scope="sample").perturbation(ctx, batch)
    norms = sum(e.square().sum((1, 2)) for e in by_row.values()).sqrt()
    torch.testing.assert_close(norms, torch.full((4,), rho), rtol=1e-5, atol=0)
    assert all(e[batch.attention_mask == 0].abs().max() == 0 for e in eps.values()), "pads take no budget"


@pytest.mark.evidence("align/vaccine", "definition")
def test_without_gradient_there_is_no_perturbation():
    zeros = {0: torch.zeros(2, 3, 4), 1: torch.zeros(2, 3, 4)}
    for scope in ("batch", "sample"):
        assert all(torch.equal(e, zeros[0]) for e in worst_drift(zeros, 2.0, scope).values())


@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.evidence("align/vaccine", "definition")
def test_rho_zero_is_sft_to_the_bit_under_dropout(tmp_path, scope):
    model = add_adapter(tiny_model("llama"), "trained", LoraSettings(dropout=0.5), 0).train()
    ctx, batch = scene(tmp_path, model)
    torch.manual_seed(3)
    loss, plain = gradient(ctx, Sft(), batch)
    torch.manual_seed(3)
    same, protected = gradient(ctx, Vaccine(rho=0.0, norm_scope=scope), batch)
    assert torch.equal(loss, same) and all(torch.equal(plain[name], protected[name]) for name in plain)


@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.evidence("align/vaccine", "definition")
def test_the_perturbed_loss_rises_by_rho_times_the_norm(tmp_path, scope):
    """First order: moving rho along the gradient raises the loss by rho * |g| (the sum of the rows' norms)."""
    ctx, batch = scene(tmp_path, float64_model())
    clean, rho = ctx.loss(batch).item(), 1e-3
    grads = ctx.hidden_grads(batch).values()
    squares_B = sum(g.square().sum((1, 2)) for g in grads)
    slope = squares_B.sum().sqrt() if scope == "batch" else squares_B.sqrt().sum()
    raised = Vaccine(rho=rho, norm_scope=scope).step(ctx, batch, {}).item()
    assert raised - clean == pytest.approx(rho * slope.item(), rel=0.02) and raised > clean


@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.evidence("align/vaccine", "finite_difference")
def test_the_step_is_the_slope_of_the_loss_under_the_perturbation_held_fixed(tmp_path, scope):
    ctx, batch = scene(tmp_path, float64_model())
    method = Vaccine(norm_scope=scope)
    drift = method.perturbation(ctx, batch)
    _, found = gradient(ctx, method, batch)
    for seed in range(3):
        way = random_way(found, seed)
        with ctx.hidden_offset(drift):
            slope = central_slope(ctx, way, lambda: ctx.loss(batch, grad=False))
        assert slope == pytest.approx(sum((found[name] * way[name]).sum().item() for name in found), rel=1e-5)
        assert slope != pytest.approx(central_slope(ctx, way, lambda: ctx.loss(batch, grad=False)), rel=1e-3)


def test_the_blocks_own_output_stays_as_it_was(tmp_path):
    """The authors' hook adds to it in place."""
    ctx, batch = scene(tmp_path)
    kept = []
    for block in attention_blocks(ctx.model).values():
        block.register_forward_hook(lambda _block, _inputs, output: kept.append((output[0], output[0].clone())))
    clean = ctx.loss(batch)
    assert Vaccine().step(ctx, batch, {}) > clean
    assert len(kept) == 3 * LAYERS and all(torch.equal(output, before) for output, before in kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_perturbed_and_left_without_hooks(tmp_path, family):
    model = add_adapter(tiny_model(family), "trained", LoraSettings(), 0)
    ctx, batch = scene(tmp_path, model)
    loss, plain = gradient(ctx, Sft(), batch)
    raised, protected = gradient(ctx, Vaccine(rho=0.5), batch)
    assert raised > loss and count_hooks(ctx.model) == 0
    learning = [name for name in plain if "lora_B" in name]
    assert furthest({n: protected[n] for n in learning}, {n: plain[n] for n in learning}) > 1e-3
    assert all(g.isfinite().all() for g in protected.values())


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_accumulation_adds_independent_steps(tmp_path, scope):
    bench = make_bench(tmp_path, float64_model())
    rows, ctx = make_rows("row", 4), make_context(bench)
    total = make_batch(bench, rows).normaliser
    halves = [make_batch(bench, part, total=total) for part in (rows[:2], rows[2:])]
    method = Vaccine(norm_scope=scope)
    (_, first), (_, second) = (gradient(ctx, method, half) for half in halves)
    ctx.model.zero_grad()
    for half in halves:
        method.step(ctx, half, {})
    both = {name: p.grad for name, p in ctx.parameters().items()}
    assert furthest(both, {name: first[name] + second[name] for name in first}) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_probe_changes_nothing_but_rounding(tmp_path, family):
    model = working_lora(tiny_model(family))
    ctx, batch = scene(tmp_path, model)
    before = snapshot(model)
    loss, branch = gradient(ctx, Vaccine(), batch)
    same, merged = gradient(ctx, Vaccine(probe="merged"), batch)
    assert same.item() == pytest.approx(loss.item(), rel=1e-5) and furthest(merged, branch) < 1e-3
    plain = gradient(ctx, Sft(), batch)[1]
    assert furthest(branch, plain) > 1e-2, "the perturbation matters"
    assert same_bits(before, snapshot(model))


def test_a_merged_probe_is_refused_where_it_would_be_another_model(tmp_path):
    method, model = Vaccine(probe="merged"), ModelConfig()
    with pytest.raises(ConfigError, match=r"lora\.dropout: 0\.1; set align\.probe: adapter"):
        method.check(TrainConfig(lora=LoraSettings(dropout=0.1)), model)
    with pytest.raises(ConfigError, match="parameters: full"):
        method.check(TrainConfig(parameters="full"), model)
    with pytest.raises(ConfigError, match=r"4bit weights; set align\.probe: adapter"):
        method.check(TrainConfig(), ModelConfig(quantization="4bit"))
    method.check(TrainConfig(), model)
    Vaccine().check(TrainConfig(parameters="full"), ModelConfig(quantization="4bit"))
    ctx, batch = scene(tmp_path, working_lora(tiny_model("llama"), dropout=0.1))  # an adapter that was made elsewhere
    with pytest.raises(ConfigError, match="has dropout"):
        method.step(ctx, batch, {})


def test_accumulated_gradients_survive_and_both_passes_draw_the_same_masks(tmp_path, monkeypatch):
    """The authors' code calls zero_grad after the first pass and draws dropout anew in the second."""
    ctx, batch = scene(tmp_path, working_lora(tiny_model("llama"), dropout=0.5))
    random, forward = [], ctx.model.forward
    monkeypatch.setattr(ctx.model, "forward", lambda **kw: random.append(torch.get_rng_state()) or forward(**kw))
    torch.manual_seed(1)
    _, once = gradient(ctx, Vaccine(), batch)
    assert len(random) == 2 and torch.equal(*random)
    torch.manual_seed(1)
    Vaccine().step(ctx, batch, {})
    assert furthest({name: p.grad for name, p in ctx.parameters().items()}, {n: 2 * g for n, g in once.items()}) < 1e-6


@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.evidence("align/vaccine", "reference")
def test_two_steps_equal_the_reference(tmp_path, scope):
    model = float64_model()
    before = {name: p for name, p in snapshot(model).items() if name != "lm_head.weight"}
    recorder = Recorder(Vaccine(rho=2.0, norm_scope=scope))
    config = TrainConfig(max_steps=2, batch_size=4, learning_rate=1e-2, schedule="constant", warmup_ratio=0.0,
                         parameters="full", max_grad_norm=0.0, save_every=0)  # fmt: skip
    bench = make_bench(tmp_path, model)
    train(bench, recorder, make_rows("row", 8), config)
    batches = [parts(b) for (b,) in recorder.batches]
    expected = reference.train(before, batches, SHAPE, HIDDEN, 2.0, scope, 1e-2)
    after = {name: p for name, p in snapshot(bench.loaded.model).items() if name in expected}
    assert furthest(after, expected) < 1e-9
    assert furthest(after, before) > 1e-3, "two steps were taken"
    plain = reference.train(before, batches, SHAPE, HIDDEN, 0.0, scope, 1e-2)
    assert furthest(plain, expected) > 1e-3, "the perturbation matters"


def test_vaccine_trains_with_dropout_checkpointing_and_bf16(tmp_path):
    config = TrainConfig(epochs=10, batch_size=4, accumulation=2, learning_rate=1e-2, precision="bf16", log_every=1,
                         gradient_checkpointing=True, lora=LoraSettings(dropout=0.1))  # fmt: skip
    bench = make_bench(tmp_path)
    result = fit(bench, Vaccine(rho=0.5), make_rows("row", 8), config, tmp_path / "out")
    losses = [entry["loss"] for entry in result.history]
    assert losses[-1] < 0.9 * losses[0] and count_hooks(bench.loaded.model) == 0
