"""T-Vaccine: the properties of methods.md 4.3, steps against independent maths, and the authors' bugs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from benches import (
    Recorder,
    central_slope,
    count_hooks,
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
from reference import t_vaccine as reference
from tiny import FAMILIES, HIDDEN, LAYERS, tiny_model

from apothecary.align.t_vaccine import TVaccine
from apothecary.align.vaccine import Vaccine
from apothecary.errors import ConfigError, TrainingError
from apothecary.models.anatomy import decoder_layers
from apothecary.models.settings import LoraSettings
from apothecary.train.config import TrainConfig
from apothecary.train.drift import worst_drift
from apothecary.train.fit import fit, train

EVIDENCE = "align/t_vaccine"
DEPTH, SHAPE = 4, (4, 4)  # layers, heads
ORDINARY = {"learning_rate": 1e-2, "schedule": "constant", "warmup_ratio": 0.0, "weight_decay": 0.5, "batch_size": 4,
            "max_grad_norm": 0.0, "save_every": 0}  # fmt: skip


def deep_model(dtype=torch.float64):
    return tiny_model("gpt2", 0, dtype, attn_implementation="eager", n_layer=DEPTH)


def scene(tmp_path, model=None, aux=None, **config):
    bench = make_bench(tmp_path, model, **({"aux": aux} if aux else {}))
    return make_context(bench, ("harmful",), **config), make_batch(bench, make_rows("row", 4))


def gradient(ctx, method, batch, state=None):
    """(loss, gradients by name of the parameters that have one) of a step of its own."""
    ctx.begin_step(1)
    ctx.model.zero_grad()
    loss = method.step(ctx, batch, method.init(ctx) if state is None else state)
    grads = {name: p.grad for name, p in ctx.model.named_parameters() if p.grad is not None}
    ctx.end_step()
    return loss, grads


def fixed(*layers):
    """A method and a state whose S stays what is given."""
    method = TVaccine(gamma=len(layers), resample=1000, rescore=1000, score_rows=5)
    return method, {"steps": 1, "probabilities": [], "layers": list(layers)}


class Watched(Recorder):
    """Keeps S, p and the weights at the start of each step, and those at the end."""

    def __init__(self, method):
        super().__init__(method)
        self.layers, self.probabilities, self.weights = [], [], []

    def step(self, ctx, batch, state):
        if ctx.micro == 0:
            self.weights.append(snapshot(ctx.model))
        loss = super().step(ctx, batch, state)
        if ctx.last_micro_step:
            self.layers.append(state["layers"])
            self.probabilities.append(state["probabilities"])
        return loss

    def finish(self, ctx, state):
        self.weights.append(snapshot(ctx.model))


def watch(folder, method, model=None, rows=12, **config):
    recorder, bench = Watched(method), make_bench(folder, model)
    result = train(bench, recorder, make_rows("row", rows), TrainConfig(**ORDINARY | config))
    return recorder, result


# -- the update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.evidence(EVIDENCE, "reference", "definition")
def test_three_steps_equal_the_reference(tmp_path, scope):
    """Scores over all seven harmful rows, which come in batches of 3, 3 and 1."""
    model = deep_model()
    before = {name: p for name, p in snapshot(model).items() if name != "lm_head.weight"}
    method = TVaccine(rho=2.0, gamma=2, resample=1, rescore=1000, score_rows=7, norm_scope=scope)
    bench, recorder = make_bench(tmp_path, model), Watched(method)
    config = TrainConfig(**ORDINARY, max_steps=3, parameters="full", aux_batch_size=3)
    train(bench, recorder, make_rows("row", 12), config)
    harmful = [parts(make_batch(bench, [row])) for row in bench.aux["harmful"]]
    expected = reference.probabilities(before, harmful, SHAPE, HIDDEN)
    assert recorder.probabilities[0] == pytest.approx(expected.tolist(), rel=1e-9)
    assert max(expected) > 1.5 * min(expected), "the layers differ"
    batches = [parts(b) for (b,) in recorder.batches]
    weights = reference.train(before, batches, recorder.layers, SHAPE, HIDDEN, 2.0, scope, 1e-2, 0.5)
    after = {name: p for name, p in recorder.weights[-1].items() if name in weights}
    assert furthest(after, weights) < 1e-9
    assert len({tuple(layers) for layers in recorder.layers}) > 1, "S was drawn anew"
    plain = reference.train(before, batches, recorder.layers, SHAPE, HIDDEN, 0.0, scope, 1e-2, 0.5)
    assert furthest(plain, weights) > 1e-3, "the perturbation matters"


@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.evidence(EVIDENCE, "finite_difference")
def test_the_step_is_the_slope_of_the_loss_in_s_under_the_perturbation_held_fixed(tmp_path, scope):
    ctx, batch = scene(tmp_path, deep_model(), parameters="full")
    method, state = fixed(1, 3)
    method = replace(method, norm_scope=scope)
    drift = worst_drift(ctx.hidden_grads(batch, [1, 3]), method.rho, scope)
    _, found = gradient(ctx, method, batch, state)
    for seed in range(3):
        way = random_way(found, seed)
        with ctx.hidden_offset(drift):
            slope = central_slope(ctx, way, lambda: ctx.loss(batch, grad=False))
        assert slope == pytest.approx(sum((found[name] * way[name]).sum().item() for name in found), rel=1e-5)
        assert slope != pytest.approx(central_slope(ctx, way, lambda: ctx.loss(batch, grad=False)), rel=1e-3)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.evidence(EVIDENCE, "definition")
def test_all_layers_are_vaccine(tmp_path, adapters):
    """With gamma = L no score matters; with full parameters embeddings, final norm and head rest."""
    model = working_lora(tiny_model("llama"), dropout=0.3) if adapters else tiny_model("llama")
    ctx, batch = scene(tmp_path, model, parameters="lora" if adapters else "full")
    torch.manual_seed(1)
    loss, expected = gradient(ctx, Vaccine(rho=3.0), batch, {})
    torch.manual_seed(1)
    same, found = gradient(ctx, TVaccine(rho=3.0, gamma=LAYERS, score_rows=5), batch)
    inside = {name: g for name, g in expected.items() if ".layers." in name}
    assert torch.equal(loss, same) and same_bits(found, inside)
    assert (len(inside) == len(expected)) == adapters


@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.evidence(EVIDENCE, "definition")
def test_the_perturbation_of_s_has_norm_rho_and_points_uphill(tmp_path, monkeypatch, scope):
    ctx, batch = scene(tmp_path, deep_model(), parameters="full")
    grads = ctx.hidden_grads(batch)
    given, offset = {}, ctx.hidden_offset
    monkeypatch.setattr(ctx, "hidden_offset", lambda offsets: given.update(offsets) or offset(offsets))
    method, state = fixed(1, 3)
    method = TVaccine(**{**method.__dict__, "rho": 0.7, "norm_scope": scope})
    gradient(ctx, method, batch, state)
    assert list(given) == [1, 3]
    squares_B = sum(e.square().sum((1, 2)) for e in given.values())
    norm = squares_B.sum().sqrt() if scope == "batch" else squares_B.sqrt()
    torch.testing.assert_close(norm, torch.full_like(norm, 0.7), rtol=1e-5, atol=0)
    for layer, eps in given.items():
        for e, g in zip(eps, grads[layer], strict=True):
            assert torch.cosine_similarity(e.flatten(), g.flatten(), dim=0).item() == pytest.approx(1.0, abs=1e-12)
        assert eps[batch.attention_mask == 0].abs().max() == 0, "pads take no budget"


@pytest.mark.parametrize("parameters", ["lora", "full"])
@pytest.mark.evidence(EVIDENCE, "definition")
def test_only_the_layers_of_s_move_under_weight_decay(tmp_path, parameters):
    """Also their LoRA on MLPs, which the authors' code leaves trainable in every layer."""
    method = TVaccine(gamma=2, resample=1, rescore=2, score_rows=5)
    model = tiny_model("llama", num_hidden_layers=DEPTH)
    recorder, _ = watch(tmp_path, method, model, parameters=parameters, max_steps=5, accumulation=2)
    for layers, before, after in zip(recorder.layers, *zip(*pairwise(recorder.weights), strict=True), strict=True):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        inside = {name for name in before if any(f".layers.{i}." in f".{name}" for i in layers)}
        learning = {name for name in inside if parameters == "full" or "lora_B" in name}
        assert learning <= moved <= inside
        assert parameters == "full" or any("mlp" in name for name in moved)
    assert len({tuple(layers) for layers in recorder.layers}) > 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.evidence(EVIDENCE, "definition")
def test_leaving_out_what_lies_below_changes_no_bit(tmp_path, monkeypatch, adapters, checkpointing, precision):
    """Against two whole passes with a graph from the embeddings on."""
    model = tiny_model("llama", num_hidden_layers=DEPTH)
    model = working_lora(model, dropout=0.5) if adapters else model.train()
    ctx, batch = scene(tmp_path, model, parameters="lora" if adapters else "full", precision=precision)
    if checkpointing:
        ctx.plain.gradient_checkpointing_enable({"use_reentrant": False})
    method, state = fixed(2, 3)
    torch.manual_seed(1)
    loss, found = gradient(ctx, method, batch, dict(state))
    random = torch.get_rng_state()
    monkeypatch.setattr(ctx, "reusing", lambda lowest: torch.enable_grad())
    monkeypatch.setattr(ctx, "trainable", lambda layers: None)
    torch.manual_seed(1)
    plain, everything = gradient(ctx, method, batch, dict(state))
    assert torch.equal(loss, plain) and torch.equal(random, torch.get_rng_state())
    assert 0 < len(found) < len(everything) and same_bits(found, {name: everything[name] for name in found})
    assert all(".layers.2." in name or ".layers.3." in name for name in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_perturbed_and_left_as_it_was(tmp_path, family):
    """The authors' code finds attention blocks by class, and holds state in its own model files."""
    ctx, batch = scene(tmp_path, working_lora(tiny_model(family)))
    flags = [p.requires_grad for p in ctx.model.parameters()]
    method, state = fixed(1)
    raised, grads = gradient(ctx, method, batch, state)
    assert raised > ctx.loss(batch) and all(g.isfinite().all() and g.abs().max() > 0 for g in grads.values())
    layer = decoder_layers(ctx.model)[1][0]
    assert set(grads) == {n for n in ctx.parameters() if n.startswith(f"{layer}.")}
    assert count_hooks(ctx.model) == 0 and not any("forward" in vars(module) for module in ctx.model.modules())
    assert flags == [p.requires_grad for p in ctx.model.parameters()]


def test_it_saves_less_for_backward_than_vaccine(tmp_path):
    """And the less the higher the lowest layer of S lies."""

    def saved(method, state):
        ctx, batch = scene(tmp_path, working_lora(tiny_model("llama", num_hidden_layers=DEPTH)))
        sizes = {}
        keep = lambda tensor: sizes.update({tensor.data_ptr(): tensor.nbytes}) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            gradient(ctx, method, batch, state)
        return sum(sizes.values())

    full = saved(Vaccine(), {})
    assert saved(*fixed(3)) < saved(*fixed(1, 3)) < full


# -- scores and draws -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["token_mean", "sample_mean"])
@pytest.mark.evidence(EVIDENCE, "definition")
def test_scores_average_the_norms_of_single_rows(tmp_path, reduction):
    """One row of the authors' code would give any of the numbers that are averaged here."""
    bench = make_bench(tmp_path, deep_model())
    ctx = make_context(bench, ("harmful",), reduction=reduction, aux_batch_size=3)
    p = TVaccine(score_rows=7).probabilities(ctx)
    assert ctx.auxiliary.drawn == {"harmful": 3}, "batches of 3, 3 and 1"
    norms = []
    for row in bench.aux["harmful"]:
        grads = make_context(bench, ("harmful",), reduction=reduction).hidden_grads(make_batch(bench, [row], reduction))
        norms.append(torch.stack([g.norm() for g in grads.values()]))
    mean = torch.stack(norms).mean(0)
    torch.testing.assert_close(p, mean / mean.sum(), rtol=1e-10, atol=0)
    assert p.sum().item() == pytest.approx(1.0, abs=1e-14) and p.shape == (DEPTH,)
    single = torch.stack([n / n.sum() for n in norms])
    assert (single - p).abs().max(1).values.min() > 1e-3, "no single row gives the mean"


def test_the_harmful_rows_come_from_one_iterator(tmp_path):
    """The authors' code rebuilds its loader once the first epoch is over."""
    ctx, _ = scene(tmp_path, aux_batch_size=2)
    method, seen, aux = TVaccine(score_rows=2), [], ctx.aux
    ctx.aux = lambda role, per: seen.append(aux(role, per)) or seen[-1]
    for _ in range(8):
        ctx.begin_step(1)
        ctx.begin_micro_step(0)
        method.probabilities(ctx)
    rows = [row for batch in seen for row in batch.row_ids]
    once = sorted(f"harmful{i}" for i in range(7))
    assert sorted(rows[:7]) == once == sorted(rows[7:14]) and rows[:7] != rows[7:14]


@pytest.mark.evidence(EVIDENCE, "definition")
def test_s_holds_gamma_layers_and_layers_with_higher_scores_more_often(tmp_path):
    ctx, _ = scene(tmp_path)
    p, draws = [0.1, 0.2, 0.3, 0.4], 3000
    method = TVaccine(gamma=2)
    drawn = [method.draw(ctx, p, step) for step in range(draws)]
    assert all(len(set(s)) == 2 and s == sorted(s) and set(s) <= set(range(4)) for s in drawn)
    shares = [sum(layer in s for s in drawn) / draws for layer in range(4)]
    exact = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)]
    assert shares == sorted(shares) and shares == pytest.approx(exact, abs=4 * 0.5 / draws**0.5)
    assert drawn == [method.draw(ctx, p, step) for step in range(draws)], "keyed by seed and step"
    other = make_context(make_bench(tmp_path / "other", seed=1))
    assert drawn != [method.draw(other, p, step) for step in range(draws)]


@pytest.mark.evidence(EVIDENCE, "definition")
def test_layers_are_scored_and_drawn_at_their_intervals(tmp_path, monkeypatch):
    ctx, batch = scene(tmp_path)
    method = TVaccine(gamma=1, resample=2, rescore=3, score_rows=5)
    state, scored, drawn = method.init(ctx), [], []
    count = lambda ctx: scored.append(state["steps"]) or torch.tensor([0.5, 0.5])  # noqa: E731
    monkeypatch.setattr(TVaccine, "probabilities", lambda self, ctx: count(ctx))
    monkeypatch.setattr(TVaccine, "draw", lambda self, ctx, p, step: drawn.append(step) or [step % 2])
    random = torch.get_rng_state()
    for _ in range(7):
        ctx.begin_step(2)
        for micro in range(2):
            ctx.begin_micro_step(micro)
            method.step(ctx, batch, state)
    assert scored == [0, 3, 6] and drawn == [0, 2, 4, 6] and state["steps"] == 7
    assert torch.equal(random, torch.get_rng_state()), "choosing takes nothing from the dropout's randomness"


def test_scores_that_no_layer_can_be_drawn_by_are_named(tmp_path):
    ctx, _ = scene(tmp_path)
    with torch.no_grad():
        decoder_layers(ctx.model)[0][1].self_attn.v_proj.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"harmful rows give the layers probabilities \[nan"):
        TVaccine(score_rows=5).probabilities(ctx)


# -- the training -----------------------------------------------------------------------------------------------------


@pytest.mark.evidence(EVIDENCE, "accumulation")
def test_accumulation_adds_independent_micro_batches_of_one_s(tmp_path):
    bench = make_bench(tmp_path, deep_model())
    ctx, rows = make_context(bench, ("harmful",), parameters="full"), make_rows("row", 4)
    total = make_batch(bench, rows).normaliser
    method, state = fixed(1, 2)
    halves = [make_batch(bench, part, total=total) for part in (rows[:2], rows[2:])]
    first, second = (gradient(ctx, method, half, dict(state))[1] for half in halves)
    ctx.model.zero_grad()
    ctx.begin_step(2)
    for micro, half in enumerate(halves):
        ctx.begin_micro_step(micro)
        method.step(ctx, half, state)
    both = {name: p.grad for name, p in ctx.model.named_parameters() if p.grad is not None}
    expected = {name: first[name] + second[name] for name in first}
    assert both.keys() == expected.keys()
    assert all(torch.allclose(both[name], expected[name], rtol=1e-9, atol=1e-15) for name in both)


@pytest.mark.evidence(EVIDENCE, "accumulation")
def test_with_one_radius_a_row_any_accumulation_is_the_same(tmp_path):
    def run(accumulation):
        method = TVaccine(gamma=2, resample=1, rescore=2, score_rows=5, norm_scope="sample")
        config = {"accumulation": accumulation, "max_steps": 3, "batch_size": 8, "aux_batch_size": 3}
        recorder, _ = watch(tmp_path / str(accumulation), method, deep_model(), parameters="full", **config)
        return recorder

    once = run(1)
    for accumulation in (2, 8):
        other = run(accumulation)
        assert other.layers == once.layers and other.probabilities[0] == once.probabilities[0]
        assert furthest(other.weights[-1], once.weights[-1]) < 1e-9
        assert furthest(once.weights[-1], once.weights[0]) > 1e-3


@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_t_vaccine_trains_with_dropout_checkpointing_and_bf16(tmp_path, parameters):
    config = TrainConfig(epochs=10, batch_size=4, accumulation=2, learning_rate=1e-2, parameters=parameters,
                         gradient_checkpointing=True, precision="bf16", lora=LoraSettings(dropout=0.1),
                         log_every=1)  # fmt: skip
    bench = make_bench(tmp_path)
    method = TVaccine(rho=0.5, gamma=1, resample=2, rescore=5, score_rows=5)
    result = fit(bench, method, make_rows("row", 8), config, tmp_path / "out")
    losses = [entry["loss"] for entry in result.history]
    assert losses[-1] < 0.9 * losses[0] and count_hooks(bench.loaded.model) == 0


def test_layers_and_rows_that_are_missing_are_refused(tmp_path):
    ctx, _ = scene(tmp_path)
    with pytest.raises(ConfigError, match=r"gamma = 8 layers .* the model has 2; set align\.gamma to at most 2"):
        TVaccine(score_rows=5).init(ctx)
    with pytest.raises(ConfigError, match=r"on 32 harmful rows, there are 7; lower align\.score_rows"):
        TVaccine(gamma=2).init(ctx)
    bench = make_bench(tmp_path, aux={"benign": make_rows("benign", 3)})
    with pytest.raises(ConfigError, match="needs rows of role harmful"):
        train(bench, TVaccine(), make_rows("row", 4), TrainConfig(max_steps=1))
    for field in ("gamma", "resample", "rescore", "score_rows"):
        with pytest.raises(ConfigError, match=f"{field}.* at least 1"):
            TVaccine(**{field: 0})
    with pytest.raises(ConfigError, match=r"rho.* at least 0"):
        TVaccine(rho=-1.0)
