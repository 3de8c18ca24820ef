"""Booster: the properties of methods.md 4.5, two steps against independent maths, and the authors' bugs."""

from __future__ import annotations

import pytest
import torch
from benches import (
    Halt,
    Recorder,
    count_hooks,
    float64_model,
    furthest,
    largest,
    make_batch,
    make_bench,
    make_context,
    make_rows,
    parts,
    same_bits,
    snapshot,
    without_key_biases,
    working_lora,
)
from reference import booster as reference
from tiny import FAMILIES, LAYERS, tiny_model
from torch import nn

from apothecary.align.booster import Booster
from apothecary.align.sft import Sft
from apothecary.errors import ConfigError
from apothecary.models.settings import LoraSettings
from apothecary.train.config import TrainConfig
from apothecary.train.fit import fit, train

SHAPE = (LAYERS, 4)
EVIDENCE = "align/booster"


def scene(tmp_path, model=None, **config):
    bench = make_bench(tmp_path, model)
    return make_context(bench, ("harmful",), aux_batch_size=3, **config), make_batch(bench, make_rows("row", 4))


def gradient(ctx, method, batch):
    ctx.model.zero_grad()
    ctx.begin_step(1)
    ctx.auxiliary.drawn.clear()  # the same harmful rows at every call
    ctx.begin_micro_step(0)
    loss = method.step(ctx, batch, {})
    return loss, {name: p.grad.clone() for name, p in ctx.parameters().items() if p.grad is not None}


def distance(a, b):
    return torch.cat([(a[name] - b[name]).flatten() for name in a]).norm().item()


# -- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.evidence(EVIDENCE, "reference", "definition")
def test_two_steps_equal_the_reference(tmp_path):
    model = float64_model()
    before = {name: p for name, p in snapshot(model).items() if name != "lm_head.weight"}
    recorder = Recorder(Booster(lamb=2.0, alpha=0.3))
    config = TrainConfig(max_steps=2, batch_size=4, learning_rate=1e-2, schedule="constant", warmup_ratio=0.0,
                         parameters="full", max_grad_norm=0.0, save_every=0, aux_batch_size=3, log_every=1)  # fmt: skip
    bench = make_bench(tmp_path, model)
    result = train(bench, recorder, make_rows("row", 8), config)
    batches, draws = [], bench.context(config, ("harmful",))
    for (align,) in recorder.batches:
        draws.begin_step(1)
        draws.begin_micro_step(0)
        pair = align, draws.aux("harmful", per="step")
        batches.append([parts(b) for b in pair])
    expected, steps = reference.train(before, batches, SHAPE, 2.0, 0.3, 1e-2)
    for got, logged, entry, (wanted, components) in zip(recorder.gradients, recorder.logged, result.history, steps,
                                                        strict=True):  # fmt: skip
        assert largest({name: got[name] for name in wanted}, wanted) < 1e-9
        assert logged == pytest.approx(components, rel=1e-9)
        assert entry["loss"] == pytest.approx(components["align"] + components["regulariser"], rel=1e-6), "fp32"
    after = {name: p for name, p in snapshot(bench.loaded.model).items() if name in expected}
    assert furthest(without_key_biases(after), without_key_biases(expected)) < 1e-9
    plain, _ = reference.train(before, batches, SHAPE, 0.0, 0.3, 1e-2)
    assert furthest(plain, expected) > 1e-3, "the regulariser matters"


@pytest.mark.parametrize("parameters", ["full", "lora"])
@pytest.mark.evidence(EVIDENCE, "finite_difference")
def test_the_step_is_the_slope_of_the_objective_along_a_fixed_direction(tmp_path, parameters):
    lamb, alpha, eps = 3.0, 0.2, 1e-5
    model = float64_model() if parameters == "full" else working_lora(float64_model()).double()
    ctx, batch = scene(tmp_path, model)
    _, found = gradient(ctx, Booster(lamb=lamb, alpha=alpha), batch)
    harmful = make_harmful(ctx)
    q = torch.autograd.grad(ctx.loss(harmful), list(ctx.parameters().values()))
    norm = torch.stack([g.square().sum() for g in q]).sum().sqrt()
    attack = {name: -alpha * g / norm for name, g in zip(ctx.parameters(), q, strict=True)}
    source = torch.Generator().manual_seed(1)
    for _ in range(3):
        way = {name: torch.randn(p.shape, generator=source, dtype=p.dtype) for name, p in ctx.parameters().items()}

        def objective(t, way=way):
            with ctx.perturbed({name: t * u for name, u in way.items()}):
                align, start = ctx.loss(batch, grad=False), ctx.loss(harmful, grad=False)
                with ctx.perturbed(attack):
                    return (align + lamb * (start - ctx.loss(harmful, grad=False))).item()

        slope = (objective(eps) - objective(-eps)) / (2 * eps)
        assert slope == pytest.approx(sum((found[name] * way[name]).sum().item() for name in found), rel=1e-5)


@pytest.mark.parametrize("alpha", [0.1, 2.0])
@pytest.mark.evidence(EVIDENCE, "definition")
def test_the_harmful_step_has_length_alpha_and_points_downhill(tmp_path, alpha):
    ctx, _ = scene(tmp_path, float64_model())
    before, q = ctx.value_and_grads(ctx.aux("harmful", per="step"))
    there = Booster(alpha=alpha).after_harmful_step(ctx, dict(q))
    step = {name: there[name] - p.detach() for name, p in ctx.parameters().items()}
    length = distance(step, scaled(step, 0.0))
    assert length == pytest.approx(alpha, rel=1e-6)
    cosine = sum((step[name] * q[name]).sum().item() for name in q) / (length * distance(q, scaled(q, 0.0)))
    assert cosine == pytest.approx(-1.0, rel=1e-6)
    if alpha < 1:
        with ctx.at(there):
            assert ctx.loss(make_harmful(ctx)) < before


def scaled(a, factor):
    return {name: factor * g for name, g in a.items()}


def make_harmful(ctx):
    ctx.begin_micro_step(0)
    return ctx.aux("harmful", per="step")


def test_without_a_harmful_gradient_nothing_moves(tmp_path):
    ctx, _ = scene(tmp_path, float64_model())
    zeros = {name: torch.zeros_like(p) for name, p in ctx.parameters().items()}
    assert same_bits(Booster().after_harmful_step(ctx, zeros), snapshot(ctx.model))


@pytest.mark.evidence(EVIDENCE, "definition")
def test_lambda_zero_is_sft_to_the_bit_under_dropout(tmp_path):
    ctx, batch = scene(tmp_path, working_lora(tiny_model("llama"), dropout=0.5))
    torch.manual_seed(3)
    loss, plain = gradient(ctx, Sft(), batch)
    torch.manual_seed(3)
    same, protected = gradient(ctx, Booster(lamb=0.0), batch)
    assert torch.equal(loss, same) and same_bits(plain, protected)


@pytest.mark.evidence(EVIDENCE, "definition")
def test_the_regulariser_vanishes_linearly_in_alpha(tmp_path):
    ctx, batch = scene(tmp_path, float64_model())
    _, plain = gradient(ctx, Sft(), batch)
    sizes = [distance(gradient(ctx, Booster(alpha=alpha), batch)[1], plain) for alpha in (1e-3, 1e-4, 0.0)]
    assert sizes[0] / sizes[1] == pytest.approx(10, rel=0.01) and sizes[1] > 1e-6 and sizes[2] < 1e-12


# -- the authors' bugs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_bit_equal_after_the_probes(tmp_path, monkeypatch, dtype, fails):
    """The authors add the step back, which loses bits."""
    ctx, batch = scene(tmp_path, tiny_model("llama", dtype=dtype))
    before, moved, backward = snapshot(ctx.model), [], ctx.backward

    def spy(work, weight=1.0):
        moved.append(snapshot(ctx.model))
        if fails and len(moved) == 2:
            raise Halt
        return backward(work, weight)

    monkeypatch.setattr(ctx, "backward", spy)
    try:
        Booster(alpha=0.5).step(ctx, batch, {})
    except Halt:
        assert fails
    assert len(moved) == 2 and not same_bits(moved[1], before) and same_bits(snapshot(ctx.model), before)
    added = {name: (moved[1][name] - p) for name, p in before.items()}
    assert not same_bits({name: moved[1][name] - d for name, d in added.items()}, before), "nothing to restore"


def test_accumulated_gradients_survive_and_the_probes_run_once_a_step(tmp_path):
    bench = make_bench(tmp_path, float64_model())
    rows, ctx = make_rows("row", 4), make_context(bench, ("harmful",), aux_batch_size=3)
    total = make_batch(bench, rows).normaliser
    first, second = (make_batch(bench, part, total=total) for part in (rows[:2], rows[2:]))
    single = [gradient(ctx, Sft(), half)[1] for half in (first, second)]
    regulariser = {name: g - single[1][name] for name, g in gradient(ctx, Booster(), second)[1].items()}
    ctx.model.zero_grad()
    ctx.auxiliary.drawn.clear()
    ctx.begin_step(2)
    for micro, half in enumerate((first, second)):
        ctx.begin_micro_step(micro)
        Booster().step(ctx, half, {})
        assert ctx.auxiliary.drawn == ({"harmful": 1} if micro else {})
    expected = {name: single[0][name] + single[1][name] + regulariser[name] for name in regulariser}
    assert largest({name: p.grad for name, p in ctx.parameters().items()}, expected) < 1e-9
    assert set(ctx.logged) == {"align", "harmful_before", "harmful_after", "regulariser"}


def test_a_parameter_without_gradient_is_left_alone(tmp_path):
    model = tiny_model("llama")
    model.unused = nn.Parameter(torch.ones(3))
    bench = make_bench(tmp_path, model)
    config = TrainConfig(max_steps=2, batch_size=4, parameters="full", weight_decay=0.5, save_every=0)
    recorder = Recorder(Booster())
    train(bench, recorder, make_rows("row", 8), config)
    assert all("unused" not in step and len(step) > 5 for step in recorder.gradients)
    assert torch.equal(bench.loaded.model.unused, torch.ones(3))


def test_both_harmful_passes_draw_the_same_dropout_masks(tmp_path):
    """With alpha 0 they are one pass twice, so that the regulariser is zero; other masks would leave a difference."""
    ctx, batch = scene(tmp_path, working_lora(tiny_model("llama"), dropout=0.5).double())
    torch.manual_seed(3)
    _, plain = gradient(ctx, Sft(), batch)
    torch.manual_seed(3)
    _, protected = gradient(ctx, Booster(alpha=0.0), batch)
    size = distance(plain, scaled(plain, 0.0))
    assert distance(protected, plain) < 1e-6 * size and ctx.logged["regulariser"] == pytest.approx(0, abs=1e-6)
    harmful = make_harmful(ctx)
    torch.manual_seed(4)
    assert not torch.equal(ctx.loss(harmful), ctx.loss(harmful)), "dropout is not at work"


def test_the_loss_reported_is_the_objective(tmp_path):
    ctx, batch = scene(tmp_path, float64_model())
    loss, _ = gradient(ctx, Booster(lamb=2.0), batch)
    logged = ctx.logged
    assert loss.item() == pytest.approx(logged["align"] + logged["regulariser"], rel=1e-12)
    assert logged["regulariser"] == pytest.approx(2 * (logged["harmful_before"] - logged["harmful_after"]), rel=1e-12)
    assert logged["regulariser"] > 0, "a harmful step lowers the harmful loss"


# -- at work ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path, family):
    ctx, batch = scene(tmp_path, working_lora(tiny_model(family)))
    _, plain = gradient(ctx, Sft(), batch)
    _, protected = gradient(ctx, Booster(), batch)
    assert furthest(protected, plain) > 1e-3 and all(g.isfinite().all() for g in protected.values())
    assert count_hooks(ctx.model) == 0


@pytest.mark.parametrize("parameters", ["full", "lora"])
def test_gradient_checkpointing_changes_no_gradient(tmp_path, parameters):
    def run(checkpointing):
        model = float64_model() if parameters == "full" else working_lora(float64_model()).double()
        ctx, batch = scene(tmp_path, model.train())
        if checkpointing:
            ctx.plain.gradient_checkpointing_enable({"use_reentrant": False})
        return gradient(ctx, Booster(), batch)[1]

    assert largest(run(True), run(False)) < 1e-9


@pytest.mark.parametrize("parameters", ["full", "lora"])
def test_booster_trains_with_dropout_checkpointing_and_bf16(tmp_path, parameters):
    config = TrainConfig(max_steps=10, batch_size=4, accumulation=2, learning_rate=1e-2, precision="bf16", log_every=1,
                         gradient_checkpointing=True, lora=LoraSettings(dropout=0.1), parameters=parameters,
                         aux_batch_size=3)  # fmt: skip
    bench = make_bench(tmp_path)
    result = fit(bench, Booster(lamb=1.0), make_rows("row", 8), config, tmp_path / "out")
    losses = [entry["align"] for entry in result.history]
    assert losses[-1] < 0.9 * losses[0] and count_hooks(bench.loaded.model) == 0


def test_training_narrows_what_a_harmful_step_gains(tmp_path):
    """The regulariser is minimised: beside plain SFT on the same rows, a harmful step gains less."""
    gains = []
    for lamb in (1e-9, 5.0):
        config = TrainConfig(epochs=20, batch_size=8, learning_rate=5e-3, aux_batch_size=7, log_every=1)
        result = fit(make_bench(tmp_path / str(lamb)), Booster(lamb=lamb), make_rows("row", 8), config,
                     tmp_path / str(lamb) / "out")  # fmt: skip
        last = result.history[-1]
        gains.append(last["harmful_before"] - last["harmful_after"])
    assert gains[1] < 0.7 * gains[0]


def test_harmful_rows_are_required_and_ranges_are_checked(tmp_path):
    bench = make_bench(tmp_path, aux={"benign": make_rows("benign", 3)})
    with pytest.raises(ConfigError, match="'booster' needs rows of role harmful"):
        train(bench, Booster(), make_rows("row", 4), TrainConfig(max_steps=1))
    for wrong in ({"lamb": -1.0}, {"alpha": -0.1}, {"alpha": float("nan")}):
        with pytest.raises(ConfigError, match="expected at least 0"):
            Booster(**wrong)
