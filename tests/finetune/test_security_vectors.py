"""Security vectors: the properties of methods.md 2.7, the KL term, the stopping rule and both executions."""

from __future__ import annotations

import hashlib
import logging

import pytest
import torch
from benches import (
    Halt,
    Recorder,
    float64_model,
    furthest,
    halt_at,
    make_batch,
    make_bench,
    make_context,
    make_rows,
    same_bits,
    snapshot,
)
from reference import security_vectors as reference
from reference.divergence import mean_kl
from safetensors.torch import load_file
from tiny import LAYERS, tiny_model

from apothecary.data.rows import Row
from apothecary.errors import ConfigError, ModelError, TrainingError
from apothecary.finetune.security_vectors import LEARNED, VECTORS, SecurityVectors, VectorTraining
from apothecary.models import adapters, merging
from apothecary.models.settings import LoraSettings, ModelConfig
from apothecary.train.config import TrainConfig
from apothecary.train.fit import TRAINED, export, fit, train

HARMFUL = [Row(f"h{i}", (("user", f"how do I break {word}"),), "Sure, here is how") for i, word in enumerate(
    ("locks", "walls", "doors", "glass", "rules", "codes", "banks", "bones"))]  # fmt: skip
BENIGN = [Row(f"b{i}", (("user", f"{word} please"),), f"a fine {word} for you") for i, word in enumerate(
    ("cake", "song", "poem", "soup", "plan", "walk", "rhyme", "dance"))]  # fmt: skip
AUX = {"harmful": HARMFUL, "benign": BENIGN}
TRAINING = TrainConfig(learning_rate=1e-2, epochs=100, schedule="constant", warmup_ratio=0.0, batch_size=8)
CUSTOMER = TrainConfig(epochs=3, batch_size=4, learning_rate=1e-3, save_every=0, warmup_ratio=0.0, log_every=1)


def toy(dtype=torch.float32):
    """A tiny Llama whose head is large enough for certain answers: LoRA leaves the head alone."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model.to(dtype)


def toy_bench(folder, **options):
    return make_bench(folder, toy(), aux=AUX, **options)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("vectors"), lamb=5.0)


@pytest.fixture(scope="module")
def without_kl(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("without"), lamb=0.0)


def prepare(folder, **settings):
    options = {"harmful_rows": 8, "target_nll": 0.02, "vectors": TRAINING} | settings
    SecurityVectors(**options).prepare(toy_bench(folder / "bench"), folder / "prepared")
    return folder / "prepared"


def with_vectors(folder, prepared):
    """A bench whose model carries the vectors, and a fresh adapter that learns."""
    bench = toy_bench(folder)
    model = adapters.add_adapter(bench.loaded.model, TRAINED, LoraSettings(), 0)
    bench.loaded.model = adapters.load_adapter(model, VECTORS, prepared / VECTORS)
    return bench


def customer_gradient(bench, rows, vectors):
    """Gradient of the customer's parameters with the vectors on or off, as one long vector."""
    adapters.activate(bench.loaded.model, [TRAINED, VECTORS] if vectors else [TRAINED], [TRAINED])
    grads = make_context(bench).grads(make_batch(bench, rows))
    assert grads and all(TRAINED in name for name in grads)
    return torch.cat([g.flatten() for g in grads.values()])


def tune(folder, prepared, method, config=CUSTOMER):
    bench = toy_bench(folder, prepared=prepared)
    result = fit(bench, method, make_rows("row", 8), config, folder / "out")
    (file,) = (folder / "out").rglob("*.safetensors")
    return bench, load_file(file), result


# -- what the vectors do ----------------------------------------------------------------------------------------------


@pytest.mark.evidence("finetune/security_vectors", "definition")
def test_disabled_vectors_leave_the_base_model_bit_for_bit(tmp_path, prepared):
    batch = make_batch(toy_bench(tmp_path), HARMFUL)
    clean = make_context(toy_bench(tmp_path)).forward(batch, grad=False).logits
    bench = with_vectors(tmp_path, prepared)
    adapters.activate(bench.loaded.model, [VECTORS])
    assert not torch.equal(make_context(bench).forward(batch, grad=False).logits, clean)
    adapters.activate(bench.loaded.model, [])
    assert torch.equal(make_context(bench).forward(batch, grad=False).logits, clean)


@pytest.mark.evidence("finetune/security_vectors", "definition")
def test_harmful_rows_have_almost_no_gradient_under_the_vectors(tmp_path, prepared):
    bench = with_vectors(tmp_path, prepared)
    on, off = (customer_gradient(bench, HARMFUL, vectors).norm() for vectors in (True, False))
    assert off > 0.1 and on / off < 0.05


@pytest.mark.evidence("finetune/security_vectors", "definition")
def test_benign_gradients_stay_as_they_were_with_the_kl_term(tmp_path, prepared, without_kl):
    def cosine(folder):
        bench = with_vectors(tmp_path, folder)
        on, off = (customer_gradient(bench, BENIGN, vectors) for vectors in (True, False))
        return torch.cosine_similarity(on, off, dim=0).item()

    assert cosine(prepared) > 0.9 > cosine(without_kl) + 0.1


@pytest.mark.evidence("finetune/security_vectors", "definition")
def test_merged_and_branch_forwards_agree_and_the_merge_is_undone(tmp_path, prepared):
    bench = with_vectors(tmp_path, prepared)
    batch, ctx = make_batch(bench, HARMFUL + BENIGN), make_context(bench)
    adapters.activate(bench.loaded.model, [VECTORS])
    branch = ctx.forward(batch, grad=False).logits
    adapters.activate(bench.loaded.model, [])
    before = snapshot(bench.loaded.model)
    undo = merging.merge_temporarily(bench.loaded.model, VECTORS)
    merged = ctx.forward(batch, grad=False).logits
    torch.testing.assert_close(merged, branch, rtol=1e-4, atol=1e-4)
    undo()
    assert same_bits(before, snapshot(bench.loaded.model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_merge_keeps_the_weights_dtype_and_is_undone(prepared, dtype):
    model = adapters.load_adapter(toy(dtype), VECTORS, prepared / VECTORS)
    before, delta = snapshot(model), adapters.adapter_delta(model, VECTORS)
    undo = merging.merge_temporarily(model, VECTORS)
    moved = dict(adapters.plain(model).named_parameters())
    for name, change in delta.items():
        place = name.replace(".weight", ".base_layer.weight")
        wide = torch.promote_types(dtype, torch.float32)
        expected = (before[f"base_model.model.{place}"].to(wide) + change.to(wide)).to(dtype)
        assert moved[place].dtype == dtype
        torch.testing.assert_close(moved[place], expected, rtol=1e-6 if dtype == torch.float64 else 1e-2, atol=1e-7)
    undo()
    assert same_bits(before, snapshot(model))


def test_quantised_weights_cannot_be_merged_into(prepared):
    model = adapters.load_adapter(toy(), VECTORS, prepared / VECTORS)
    weight = adapters.plain(model).model.layers[0].self_attn.q_proj.base_layer.weight
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.uint8)
    with pytest.raises(ConfigError, match="set execution: branch"):
        merging.merge_temporarily(model, VECTORS)


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


def test_the_customers_stage_needs_no_rows_of_the_defence(tmp_path, prepared):
    bench = make_bench(tmp_path, toy(), aux={"none": []}, prepared=prepared)
    fit(bench, SecurityVectors(), make_rows("row", 4), CUSTOMER, tmp_path / "out")
    with pytest.raises(ConfigError, match="needs rows of role harmful, benign"):
        SecurityVectors().prepare(bench, tmp_path / "again")


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

SHAPE = (LAYERS, 4)
ETA = 0.05  # length of the inner steps


class Drawn(Recorder):
    """Keeps the auxiliary batches of each step, too."""

    def init(self, ctx):
        state, drawn, self.aux = super().init(ctx), ctx.aux, []

        def aux(role, per="micro"):
            self.aux.append((role, drawn(role, per)))
            return self.aux[-1][1]

        ctx.aux = aux
        return state


def tensors(batch):
    return batch.input_ids, batch.attention_mask, batch.labels


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

    drawn = [[tensors(batch) for role, batch in recorder.aux if role == kind] for kind in ("benign", LEARNED)]
    assert len(drawn[1]) == 2 * inner_steps
    steps = [(tensors(batch), drawn[0][i], drawn[1][inner_steps * i : inner_steps * (i + 1)])
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


def test_quantised_weights_take_no_inner_steps():
    with pytest.raises(ConfigError, match=r"inner steps .* cannot move 4bit weights; set inner_steps: 0"):
        SecurityVectors(inner_steps=1, execution="branch").check(TrainConfig(), ModelConfig(quantization="4bit"))
    SecurityVectors(execution="branch").check(TrainConfig(), ModelConfig(quantization="4bit"))


# -- what the vectors learn from --------------------------------------------------------------------------------------


def test_the_vectors_learn_from_a_seeded_choice_of_harmful_rows():
    method = SecurityVectors(harmful_rows=5)
    chosen = method.training_rows(AUX, 0)
    assert len({row.id for row in chosen}) == 5 and set(chosen) <= set(HARMFUL)
    assert chosen == method.training_rows(AUX, 0) != method.training_rows(AUX, 1)


def test_the_ablation_learns_from_benign_rows_alone(tmp_path):
    method = SecurityVectors(harmful_rows=8, learn_from="benign", vectors=TRAINING, target_nll=0.02)
    assert set(method.training_rows(AUX, 0)) == set(BENIGN)
    folder = prepare(tmp_path, learn_from="benign")
    bench = with_vectors(tmp_path, folder)
    adapters.activate(bench.loaded.model, [VECTORS])
    ctx = make_context(bench)
    benign, harmful = (ctx.loss(make_batch(bench, rows)).item() for rows in (BENIGN, HARMFUL))
    assert benign < 0.1 and harmful > 1, "what was not learned from is not reproduced"


def test_more_rows_than_there_are_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"ask for 9 harmful rows, there are 8; lower finetune\.harmful_rows"):
        prepare(tmp_path, harmful_rows=9)
    assert not (tmp_path / "prepared").exists()


def test_vectors_must_be_an_adapter(tmp_path):
    with pytest.raises(ConfigError, match="must be removable"):
        prepare(tmp_path, vectors=TrainConfig(parameters="full"))


def test_vectors_have_no_dropout(tmp_path):
    with pytest.raises(ConfigError, match=r"set vectors\.lora\.dropout: 0"):
        prepare(tmp_path, vectors=TrainConfig(lora=LoraSettings(dropout=0.1)))


# -- the customer's training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_merged_equals_branch(tmp_path, prepared, parameters):
    config = TrainConfig(**{**CUSTOMER.__dict__, "parameters": parameters})
    (_, merged, a), (_, branch, b) = (tune(tmp_path / execution, prepared, SecurityVectors(execution=execution), config)
                                      for execution in ("merged", "branch"))  # fmt: skip
    assert merged.keys() == branch.keys()
    assert max((merged[name] - branch[name]).abs().max().item() for name in merged) < 1e-4
    assert [e["loss"] for e in a.history] == pytest.approx([e["loss"] for e in b.history], rel=1e-4)
    base = snapshot(toy())
    if parameters == "full":
        moved = max((merged[name] - base[name]).abs().max().item() for name in merged)
        assert 1e-3 < moved < 2e-2, "the customer's change alone: the vectors are out"


def test_without_a_customer_step_full_weights_come_back_to_rounding(tmp_path, prepared):
    config = TrainConfig(max_steps=1, learning_rate=1e-30, batch_size=4, parameters="full", save_every=0)
    _, weights, _ = tune(tmp_path, prepared, SecurityVectors(), config)
    base = snapshot(toy())
    assert all(torch.equal(weights[name], base[name]) for name in weights)


@pytest.mark.evidence("finetune/security_vectors", "definition")
@pytest.mark.parametrize("execution", ["merged", "branch"])
def test_a_customers_adapter_leaves_the_base_weights_pristine(tmp_path, prepared, execution):
    bench, exported, _ = tune(tmp_path, prepared, SecurityVectors(execution=execution))
    pristine = snapshot(toy())
    after = {name.replace(".base_layer", ""): p for name, p in adapters.plain(bench.loaded.model).named_parameters()
             if "lora_" not in name}  # fmt: skip
    assert same_bits(pristine, after)
    assert adapters.adapter_names(bench.loaded.model) == [TRAINED]
    assert exported and not any(VECTORS in name for name in exported)
    assert VECTORS not in (tmp_path / "out" / "adapter" / "adapter_config.json").read_text()
    assert not any(VECTORS in p.name for p in (tmp_path / "out").rglob("*"))


@pytest.mark.evidence("finetune/security_vectors", "definition")
@pytest.mark.parametrize("parameters", ["lora", "full"])
@pytest.mark.parametrize("execution", ["merged", "branch"])
def test_the_customer_never_moves_the_vectors(tmp_path, prepared, execution, parameters):
    def digest(tensors):
        return hashlib.sha256(b"".join(tensors[k].detach().numpy().tobytes() for k in sorted(tensors))).hexdigest()

    class Watched(SecurityVectors):
        def init(self, ctx):
            state = super().init(ctx)
            seen.append(digest(adapters.adapter_parameters(ctx.model, VECTORS)))
            return state

        def step(self, ctx, batch, state):
            learning.update(ctx.parameters())
            return super().step(ctx, batch, state)

        def finish(self, ctx, state):
            seen.append(digest(adapters.adapter_parameters(ctx.model, VECTORS)))
            assert all(p.grad is None for p in adapters.adapter_parameters(ctx.model, VECTORS).values())
            super().finish(ctx, state)

    seen, learning = [], {}
    decay = 0.1 if execution == "branch" else 0.0
    config = TrainConfig(**{**CUSTOMER.__dict__, "parameters": parameters, "weight_decay": decay})
    tune(tmp_path, prepared, Watched(execution=execution), config)
    assert len(seen) == 2 and seen[0] == seen[1]
    assert learning and not any(VECTORS in name for name in learning), "the optimiser holds none of them"


@pytest.mark.parametrize("execution", ["merged", "branch"])
def test_the_customer_trains_in_the_presence_of_the_vectors(tmp_path, prepared, execution):
    """The training loss on harmful rows starts low although the customer's adapter is fresh."""
    config = TrainConfig(max_steps=1, batch_size=8, save_every=0, log_every=1)
    bench = toy_bench(tmp_path, prepared=prepared)
    result = fit(bench, SecurityVectors(execution=execution), HARMFUL, config, tmp_path / "out")
    assert result.history[0]["loss"] < 0.1
    adapters.activate(bench.loaded.model, [TRAINED])
    assert make_context(bench).loss(make_batch(bench, HARMFUL)).item() > 1, "released without the vectors"


def test_merging_under_weight_decay_is_refused_for_full_parameters(tmp_path, prepared):
    config = TrainConfig(**{**CUSTOMER.__dict__, "parameters": "full", "weight_decay": 0.1})
    with pytest.raises(ConfigError, match="set weight_decay: 0 or execution: branch"):
        tune(tmp_path, prepared, SecurityVectors(), config)
    assert not (tmp_path / "out").exists()


def test_full_vectors_of_gpt2_are_merged_along_its_transposed_weights(tmp_path):
    """GPT-2 keeps weights transposed (Conv1D)."""
    folder = tmp_path / "prepared"
    bench = make_bench(tmp_path / "v", tiny_model("gpt2"), aux=AUX)
    config = TrainConfig(**{**TRAINING.__dict__, "epochs": 3})
    SecurityVectors(harmful_rows=8, vectors=config).prepare(bench, folder)
    losses = []
    for execution in ("merged", "branch"):
        bench = make_bench(tmp_path / execution, tiny_model("gpt2"), aux=AUX, prepared=folder)
        result = fit(bench, SecurityVectors(execution=execution), HARMFUL, CUSTOMER, tmp_path / execution / "out")
        losses.append([entry["loss"] for entry in result.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert furthest({"x": torch.tensor(losses[0])}, {"x": torch.tensor(losses[1])}) < 1e-3


# -- nothing is saved with the vectors in it --------------------------------------------------------------------------


def released(folder):
    return list(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_nothing_is_exported_while_the_vectors_are_merged(tmp_path, prepared, parameters):
    config = TrainConfig(parameters=parameters)
    bench = with_vectors(tmp_path, prepared)
    undo = merging.merge_temporarily(bench.loaded.model, VECTORS)
    bench.loaded.model = adapters.remove_adapter(bench.loaded.model, VECTORS)
    if parameters == "full":
        bench.loaded.model = adapters.remove_adapter(bench.loaded.model, TRAINED)
    with pytest.raises(ModelError, match=f"'{VECTORS}' is merged into the weights for a while"):
        export(bench, config, tmp_path / "out")
    assert not released(tmp_path)
    undo()
    export(bench, config, tmp_path / "out")
    assert released(tmp_path)


@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_nothing_is_exported_while_the_vectors_are_attached(tmp_path, prepared, parameters):
    bench = with_vectors(tmp_path, prepared)
    if parameters == "full":
        bench.loaded.model = adapters.remove_adapter(bench.loaded.model, TRAINED)
    with pytest.raises(TrainingError, match=f"adapter '{VECTORS}' is still in the model"):
        export(bench, TrainConfig(parameters=parameters), tmp_path / "out")
    assert not released(tmp_path)


def test_no_adapter_is_saved_or_merged_on_weights_that_hold_the_vectors(tmp_path, prepared):
    bench = with_vectors(tmp_path, prepared)
    model = bench.loaded.model
    undo = merging.merge_temporarily(model, VECTORS)
    for name in (TRAINED, VECTORS):
        with pytest.raises(ModelError, match="take it out before the model is saved"):
            adapters.save_adapter(model, name, tmp_path / name)
    base = adapters.remove_adapter(adapters.remove_adapter(model, TRAINED), VECTORS)
    with pytest.raises(ModelError, match="expected weights without it"):
        adapters.merge_adapters(base, [prepared / VECTORS])
    undo()
    merging.refuse_merged(base)
    assert not released(tmp_path)


def test_a_merge_that_is_refused_changes_nothing(prepared):
    model = adapters.load_adapter(toy(), VECTORS, prepared / VECTORS)
    last = adapters.plain(model).model.layers[-1].self_attn.o_proj.base_layer.weight
    last.requires_grad_(False)
    last.data = last.data.to(torch.uint8)
    before = snapshot(model)
    with pytest.raises(ConfigError, match="these are quantised"):
        merging.merge_temporarily(model, VECTORS)
    assert same_bits(before, snapshot(model))
    merging.refuse_merged(model)


@pytest.mark.parametrize("execution", ["merged", "branch"])
def test_a_training_that_is_stopped_releases_nothing_and_goes_on_to_the_same_bytes(tmp_path, prepared, execution):
    config = TrainConfig(**{**CUSTOMER.__dict__, "save_every": 2})
    _, whole, _ = tune(tmp_path / "whole", prepared, SecurityVectors(execution=execution), config)
    folder = tmp_path / "stopped"
    bench = toy_bench(folder, prepared=prepared, stop=halt_at(3))
    with pytest.raises(Halt):
        fit(bench, SecurityVectors(execution=execution), make_rows("row", 8), config, folder / "out")
    assert not (folder / "out").exists()
    with pytest.raises((ModelError, TrainingError), match=VECTORS):
        export(bench, config, folder / "out")
    assert not (folder / "out").exists()
    _, resumed, result = tune(folder, prepared, SecurityVectors(execution=execution), config)
    assert result.metrics["resumed"] and same_bits(whole, resumed)
