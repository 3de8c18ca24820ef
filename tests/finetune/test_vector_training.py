"""Training of security vectors: the objective, its KL term, the criterion and the inner loop (methods.md 2.3)."""

from __future__ import annotations

import logging

import pytest
import torch
from benches import Recorder, float64_model, furthest, make_batch, make_bench, make_context, parts, same_bits, snapshot
from reference import security_vectors as reference
from reference.divergence import mean_kl
from tiny import LAYERS, tiny_model
from vector_scenes import AUX, BENIGN, HARMFUL, TRAINING, toy, toy_bench

from apothecary.data.rows import Row
from apothecary.errors import TrainingError
from apothecary.finetune.security_vectors import LEARNED, VECTORS, SecurityVectors, VectorTraining
from apothecary.models import adapters
from apothecary.models.settings import LoraSettings
from apothecary.train.config import TrainConfig
from apothecary.train.fit import train

SHAPE = (LAYERS, 4)
ETA = 0.05  # length of the inner steps


# -- training the vectors ---------------------------------------------------------------------------------------------


@pytest.mark.evidence("finetune/security_vectors", "definition")
def test_the_kl_term_equals_the_reference(tmp_path, without_kl):
    bench = toy_bench(tmp_path)
    bench.loaded.model = adapters.load_adapter(bench.loaded.model, VECTORS, without_kl / VECTORS)
    ctx, batch = make_context(bench), make_batch(bench, BENIGN[:3])
    changed = ctx.forward(batch, grad=False).logits
    with ctx.adapters(active=()):
        base = ctx.forward(batch, grad=False).logits
    expected = mean_kl(base, changed, batch.labels)
    assert expected > 0.05
    assert VectorTraining.divergence(ctx, batch).item() == pytest.approx(expected, rel=1e-4)
    assert adapters.active_adapters(ctx.model) == [VECTORS]


@pytest.mark.evidence("finetune/security_vectors", "definition")
def test_the_kl_term_averages_within_rows_where_the_loss_does(tmp_path, without_kl):
    rows = [BENIGN[0], Row("wordy", BENIGN[1].prompt, "a much longer answer than that of the first row")]
    bench = toy_bench(tmp_path)
    bench.loaded.model = adapters.load_adapter(bench.loaded.model, VECTORS, without_kl / VECTORS)
    ctx = make_context(bench, reduction="sample_mean")
    by_row = [VectorTraining.divergence(ctx, make_batch(bench, [row], "sample_mean")).item() for row in rows]
    both = VectorTraining.divergence(ctx, make_batch(bench, rows, "sample_mean")).item()
    assert both == pytest.approx(sum(by_row) / 2, rel=1e-4)
    single = VectorTraining.divergence(make_context(bench), make_batch(bench, rows[:1])).item()
    assert by_row[0] == pytest.approx(single, rel=1e-4), "for one row both reductions agree"
    assert both != pytest.approx(VectorTraining.divergence(make_context(bench), make_batch(bench, rows)).item(), 1e-3)


def test_fresh_vectors_have_no_divergence_even_under_the_models_dropout(tmp_path):
    """Both passes draw the same dropout masks; otherwise noise would count as divergence."""
    model = tiny_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3).train()
    bench = make_bench(tmp_path, adapters.add_adapter(model, VECTORS, LoraSettings(), 0), aux=AUX)
    ctx, batch = make_context(bench), make_batch(bench, BENIGN)
    assert abs(VectorTraining.divergence(ctx, batch).item()) < 1e-5
    assert not torch.equal(ctx.per_sample_loss(batch, grad=True), ctx.per_sample_loss(batch, grad=True)), "no dropout"


@pytest.mark.evidence("finetune/security_vectors", "definition")
def test_the_step_is_nll_plus_lamb_times_kl(tmp_path, without_kl):
    bench = toy_bench(tmp_path)
    bench.loaded.model = adapters.load_adapter(bench.loaded.model, VECTORS, without_kl / VECTORS)
    adapters.plain(bench.loaded.model).requires_grad_(False)
    adapters.activate(bench.loaded.model, [VECTORS], [VECTORS])
    ctx, batch = make_context(bench, ("benign",), batch_size=8), make_batch(bench, HARMFUL)
    method = VectorTraining(lamb=3.0, target_nll=0.1)
    state = method.init(ctx)
    loss = method.step(ctx, batch, state)
    nll, kl = ctx.loss(batch).item(), VectorTraining.divergence(ctx, make_batch(bench, BENIGN)).item()
    assert loss.item() == pytest.approx(nll + 3 * kl, rel=1e-4)
    assert ctx.logged == {"harmful_nll": pytest.approx(nll, rel=1e-4), "benign_kl": pytest.approx(kl, rel=1e-4)}
    learning = ctx.parameters()
    assert all(VECTORS in name and p.grad is not None for name, p in learning.items()) and learning


@pytest.mark.parametrize(("target", "steps"), [(1e9, 10), (0.0, 14)])
def test_training_ends_when_the_mean_of_ten_steps_is_below_the_target(tmp_path, target, steps):
    config = TrainConfig(learning_rate=1e-3, max_steps=14, batch_size=4, save_every=0)
    method = Recorder(VectorTraining(lamb=0.0, target_nll=target))
    result = train(toy_bench(tmp_path), method, HARMFUL, config, VECTORS)
    assert result.metrics["steps"] == steps == len(method.logged)


@pytest.mark.evidence("finetune/security_vectors", "definition")
def test_convergence_looks_at_ten_steps(tmp_path):
    ctx = make_context(toy_bench(tmp_path))
    method, state, verdicts = VectorTraining(lamb=0.0, target_nll=0.1), {"nll": []}, []
    for nll in [1.0] * 5 + [0.05] * 10:
        ctx.logged["harmful_nll"] = nll
        verdicts.append(method.converged(ctx, state))
    assert verdicts == [False] * 14 + [True] and len(state["nll"]) == 10


# -- the criterion ----------------------------------------------------------------------------------------------------


def few_steps(folder, **settings):
    """What `prepare` tells of vectors after three steps."""
    config = TrainConfig(learning_rate=1e-3, max_steps=3, batch_size=4, save_every=0)
    method = SecurityVectors(**{"harmful_rows": 8, "lamb": 0.0, "vectors": config, **settings})
    return method.prepare(toy_bench(folder / "bench"), folder / "prepared")


def test_vectors_that_miss_the_target_say_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = few_steps(tmp_path)
    assert found["converged"] is False and found["steps"] == 3 and found["harmful_nll"] > found["target_nll"] == 0.1
    (record,) = caplog.records
    assert f"ended at {found['harmful_nll']:.2g} nats per token" in record.message
    assert (tmp_path / "prepared" / VECTORS).is_dir(), "they are kept, and reported"


def test_vectors_that_miss_the_target_stop_the_run_on_demand(tmp_path):
    with pytest.raises(TrainingError, match=r"ended at .* after 3 steps, expected below 0\.1; raise vectors\.epochs"):
        few_steps(tmp_path, require_converged=True)
    assert not (tmp_path / "prepared").exists(), "no artifact"


def test_vectors_that_meet_the_target_are_told_apart(tmp_path, caplog):
    config = TrainConfig(learning_rate=1e-3, max_steps=14, batch_size=4, save_every=0)
    found = few_steps(tmp_path, vectors=config, target_nll=1e9, require_converged=True)
    assert found["converged"] is True and found["steps"] == 10 and not caplog.records


# -- the objective against independent maths --------------------------------------------------------------------------


class Drawn(Recorder):
    """Keeps the auxiliary batches of each step, too."""

    def init(self, ctx):
        state, drawn, self.aux = super().init(ctx), ctx.aux, []

        def aux(role, per="micro"):
            self.aux.append((role, drawn(role, per)))
            return self.aux[-1][1]

        ctx.aux = aux
        return state


def random_vectors(folder):
    """An adapter on the attention projections of the float64 model whose B is not zero, on disk and as (A, B)."""
    settings = LoraSettings(rank=3, alpha=6, targets=("c_attn", "c_proj"))
    model = adapters.add_adapter(float64_model(), VECTORS, settings, 1)
    source = torch.Generator().manual_seed(2)
    for tensor in adapters.adapter_parameters(model, VECTORS).values():
        torch.nn.init.normal_(tensor, 0.0, 0.1, source)
    adapters.save_adapter(model, VECTORS, folder)
    return factors(model)


def factors(model):
    """{weight: (A, B)} of the vectors, in float64."""
    found = {name.replace(f".{VECTORS}", ""): p.detach().double() for name, p in
             adapters.adapter_parameters(model, VECTORS).items()}  # fmt: skip
    start = "base_model.model."
    layers = [name.removeprefix(start).removesuffix(".lora_A.weight") for name in found if ".lora_A." in name]
    return {f"{layer}.weight": tuple(found[f"{start}{layer}.lora_{x}.weight"] for x in "AB") for layer in layers}


@pytest.mark.evidence("finetune/security_vectors", "reference")
@pytest.mark.parametrize("inner_steps", [0, 2])
def test_two_steps_equal_the_reference(tmp_path, inner_steps):
    start = random_vectors(tmp_path / "start")
    model = float64_model()
    theta = {name: p for name, p in snapshot(model).items() if name != "lm_head.weight"}
    recorder = Drawn(VectorTraining(2.0, 0.0, inner_steps, ETA), to_float64=True)
    config = TrainConfig(max_steps=2, batch_size=4, aux_batch_size=3, learning_rate=1e-2, schedule="constant",
                         warmup_ratio=0.0, max_grad_norm=0.0, save_every=0)  # fmt: skip
    bench = make_bench(tmp_path, model, aux={"benign": BENIGN, LEARNED: HARMFUL})
    train(bench, recorder, HARMFUL, config, VECTORS, start=tmp_path / "start")

    drawn = [[parts(batch) for role, batch in recorder.aux if role == kind] for kind in ("benign", LEARNED)]
    assert len(drawn[1]) == 2 * inner_steps
    steps = [(parts(batch), drawn[0][i], drawn[1][inner_steps * i : inner_steps * (i + 1)])
             for i, (batch,) in enumerate(recorder.batches)]  # fmt: skip
    expected, seen = reference.train(theta, start, steps, SHAPE, 2.0, 2.0, ETA, 1e-2)
    found = factors(bench.loaded.model)
    for name, pair in expected.items():
        for mine, theirs, first in zip(found[name], pair, start[name], strict=True):
            assert furthest({"x": mine}, {"x": theirs}) < 1e-9
            assert furthest({"x": mine}, {"x": first}) > 1e-3, "two steps were taken"
    names = ("harmful_nll", "harmful_nll_moved", "benign_kl") if inner_steps else ("harmful_nll", "benign_kl")
    for logged, (at_theta, moved, divergence) in zip(recorder.logged, seen, strict=True):
        values = (at_theta, moved, divergence) if inner_steps else (moved, divergence)
        assert logged == {name: pytest.approx(value, rel=1e-9) for name, value in zip(names, values, strict=True)}
        assert divergence > 1e-3 and (moved < 0.99 * at_theta) == bool(inner_steps), "both terms are at work"
    pristine = {name.replace(".base_layer", ""): p for name, p in adapters.plain(bench.loaded.model).named_parameters()
                if "lora_" not in name}  # fmt: skip
    assert all(torch.equal(pristine[name], theta[name]) for name in theta), "theta' was dropped"


@pytest.mark.evidence("finetune/security_vectors", "finite_difference")
@pytest.mark.parametrize("inner_steps", [0, 2])
def test_the_gradient_is_that_of_the_objective_at_the_moved_backbone(tmp_path, inner_steps):
    ctx, batch, method = inner_scene(tmp_path, inner_steps)
    moved = method.inner_loop(ctx)
    loss = method.step(ctx, batch, {})
    parameters = ctx.parameters()
    source = torch.Generator().manual_seed(5)
    direction = {name: torch.randn(p.shape, generator=source, dtype=p.dtype) for name, p in parameters.items()}

    def value(step):
        benign = make_batch(make_bench(tmp_path, float64_model()), BENIGN)
        with ctx.perturbed(moved), ctx.perturbed({name: step * d for name, d in direction.items()}):
            return (ctx.loss(batch, grad=False) + 2.0 * method.divergence(ctx, benign)).item()

    assert loss.item() == pytest.approx(value(0.0), rel=1e-12)
    slope = sum((p.grad * direction[name]).sum() for name, p in parameters.items()).item()
    assert slope == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-5)


# -- the inner loop ---------------------------------------------------------------------------------------------------


def inner_scene(folder, inner_steps=2, length=ETA):
    """(context, harmful batch, method) over random vectors that learn; every draw takes all rows."""
    random_vectors(folder / "start")
    bench = make_bench(folder, float64_model(), aux={"benign": BENIGN, LEARNED: HARMFUL})
    model = adapters.load_adapter(bench.loaded.model, VECTORS, folder / "start").double()
    model.requires_grad_(False)
    adapters.activate(model, [VECTORS], [VECTORS])
    bench.loaded.model = model
    ctx = make_context(bench, ("benign", LEARNED), batch_size=8)
    return ctx, make_batch(bench, HARMFUL), VectorTraining(2.0, 0.0, inner_steps, length)


@pytest.mark.evidence("finetune/security_vectors", "definition")
def test_inner_steps_lower_the_harmful_loss_and_move_the_backbone_alone(tmp_path):
    ctx, batch, method = inner_scene(tmp_path)
    moved = method.inner_loop(ctx)
    backbone = {name for name, _ in ctx.model.named_parameters() if "lora_" not in name}
    assert moved.keys() == backbone and all(tensor.abs().max() > 0 for name, tensor in moved.items() if "wte" in name)
    before = ctx.loss(batch, grad=False)
    with ctx.perturbed(moved):
        after = ctx.loss(batch, grad=False)
    assert after < 0.99 * before
    first = VectorTraining(2.0, 0.0, 1, ETA).inner_loop(ctx)
    twice = {name: 2 * tensor for name, tensor in first.items()}
    assert furthest(moved, twice) > 1e-3, "the second step starts where the first has led"
    assert all(VECTORS in name for name in ctx.grads(batch))


@pytest.mark.evidence("finetune/security_vectors", "definition")
@pytest.mark.parametrize("fails", [False, True])
def test_the_inner_loop_leaves_nothing_behind(tmp_path, monkeypatch, fails):
    ctx, batch, method = inner_scene(tmp_path)
    ctx.backward(batch)
    before, flags = snapshot(ctx.model), {name: p.requires_grad for name, p in ctx.model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in ctx.parameters().items()}
    random = torch.get_rng_state()
    if fails:
        monkeypatch.setattr(method.__class__, "objective", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            method.step(ctx, batch, {})
        assert all(torch.equal(p.grad, grads[name]) for name, p in ctx.parameters().items())
    else:
        method.step(ctx, batch, {})
        assert all(not torch.equal(p.grad, grads[name]) for name, p in ctx.parameters().items()), "added to"
    assert same_bits(before, snapshot(ctx.model))
    assert flags == {name: p.requires_grad for name, p in ctx.model.named_parameters()}
    assert all(p.grad is None for name, p in ctx.model.named_parameters() if VECTORS not in name)
    assert torch.equal(random, torch.get_rng_state()) and adapters.active_adapters(ctx.model) == [VECTORS]


def test_without_inner_steps_or_with_steps_of_no_length_training_is_the_same(tmp_path):
    grads = []
    for inner_steps, length in ((0, ETA), (2, 0.0)):
        ctx, batch, method = inner_scene(tmp_path / str(inner_steps), inner_steps, length)
        method.step(ctx, batch, {})
        grads.append({name: p.grad for name, p in ctx.parameters().items()})
    assert same_bits(*grads)


def test_the_inner_loop_sees_the_chosen_rows_alone(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("apothecary.train.fit.train", lambda bench, method, rows, config, name: seen.update(
        rows=rows, learned=bench.aux[LEARNED], needs=method.needs.roles) or 1 / 0)  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        SecurityVectors(harmful_rows=3, inner_steps=1).prepare(toy_bench(tmp_path), tmp_path / "prepared")
    assert len(seen["rows"]) == 3 and seen["learned"] == seen["rows"] and seen["needs"] == ("benign", LEARNED)


@pytest.mark.parametrize("extra", [{"precision": "bf16"}, {"gradient_checkpointing": True, "accumulation": 2}])
def test_vectors_with_inner_steps_learn(tmp_path, extra):
    config = TrainConfig(**{**TRAINING.__dict__, "epochs": 8, "save_every": 0, **extra})
    recorder = Recorder(VectorTraining(1.0, 0.0, 1, 1e-3))
    train(make_bench(tmp_path, toy(), aux={"benign": BENIGN, LEARNED: HARMFUL}), recorder, HARMFUL, config, VECTORS)
    first, last = recorder.logged[0], recorder.logged[-1]
    assert last["harmful_nll"] < 0.8 * first["harmful_nll"] and last["harmful_nll_moved"] < last["harmful_nll"]
