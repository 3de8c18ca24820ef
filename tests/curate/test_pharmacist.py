"""Pharmacist: the properties of methods.md 3.8, against independent maths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benches import (
    Halt,
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
from reference import bilevel as reference
from tiny import LAYERS, tiny_model

from apothecary.curate import pharmacist
from apothecary.curate.keep import keep
from apothecary.curate.pharmacist import Pharmacist
from apothecary.data.batching import plan
from apothecary.data.rows import Row
from apothecary.errors import ConfigError, TrainingError
from apothecary.registry import lookup
from apothecary.train.config import TrainConfig
from apothecary.train.on_demand import OnDemand
from apothecary.train.progress import watched
from apothecary.train.scores import exact_scores

SHAPE = (LAYERS, 4)
FULL = TrainConfig(parameters="full", save_every=0)
PHARMACIST = "curate/pharmacist"


def parts(batch):
    return batch.input_ids, batch.attention_mask, batch.labels


def weights_of(model):
    return {name: p for name, p in snapshot(model).items() if name != "lm_head.weight"}


def cold(**fields):
    """Pharmacist at the model's own weights, all of them scored exactly."""
    return Pharmacist(**({"gradient": "exact", "warmup_share": 0.0, "warmup": FULL} | fields))


def step_scene(tmp_path):
    """Context over full float64 parameters, a batch of the pool, a harmful and a validation batch."""
    bench = make_bench(tmp_path, float64_model())
    return make_context(bench), [make_batch(bench, make_rows(tag, 4)) for tag in ("pool", "harm", "val")]


# -- the gradient of w ------------------------------------------------------------------------------------------------


@pytest.mark.evidence(PHARMACIST, "definition", "finite_difference")
@pytest.mark.parametrize("hessian", ["scalar", "exact"])
@pytest.mark.parametrize("c", [1.0, 0.3, 4.0])
@pytest.mark.parametrize("chosen", [range(7), [5, 1, 3]])
def test_the_gradient_of_w_equals_a_finite_difference_on_a_quadratic(c, chosen, hessian):
    """With harmful Hessian c I the printed (1 - alpha) stands for (1 - alpha c), so that c = 1 checks it as printed.

    The exact option finds that factor in v.
    """
    toy, w, chosen = reference.Toy(7, 5, c), torch.linspace(-1, 1, 7, dtype=torch.float64), list(chosen)
    eta, alpha = 0.3, 0.2
    expected = reference.finite_difference(lambda w: toy.value(w, chosen, eta, alpha), w)
    slopes = toy.slopes(w, chosen, eta, alpha)
    if hessian == "exact":
        slopes = (1 - alpha * c) * slopes
    found = Pharmacist(eta_theta=eta, alpha=alpha * c, hessian=hessian).gradient_of_w(w, chosen, slopes)
    assert furthest({"w": found}, {"w": expected}) < 1e-7
    assert expected.abs().min() > 1e-4, "no entry is trivially zero"


@pytest.mark.evidence(PHARMACIST, "finite_difference")
@pytest.mark.parametrize("normalise", [False, True])
def test_the_exact_gradient_of_w_equals_a_finite_difference_on_a_language_model(tmp_path, normalise):
    """There the harmful Hessian is no multiple of I, and the printed factor is another direction."""
    ctx, (batch, harmful, validation) = step_scene(tmp_path)
    w, chosen, eta, alpha = torch.linspace(-1, 1, 6, dtype=torch.float64), [4, 0, 3, 1], 0.5, 0.2
    sigma = (w.softmax(0) * 6)[chosen]
    tensors = [parts(each) for each in (batch, harmful, validation)]
    weights = weights_of(ctx.model)
    expected = reference.finite_difference(
        lambda w: reference.value(weights, w, chosen, *tensors, SHAPE, eta, alpha, normalise).detach(), w)  # fmt: skip
    found = {}
    for hessian in ("exact", "scalar"):
        method = Pharmacist(eta_theta=eta, alpha=alpha, hessian=hessian, normalise=normalise)
        target = method.target(ctx, batch, sigma, harmful, validation)
        found[hessian] = method.gradient_of_w(w, chosen, exact_scores(ctx, batch, target, "mean"))
    assert furthest({"w": found["exact"]}, {"w": expected}) < 1e-5
    unit = [g / g.norm() for g in (found["scalar"], expected)]
    assert (unit[0] - unit[1]).norm() > 1e-3, "even its direction differs"


@pytest.mark.evidence(PHARMACIST, "definition")
def test_changes_of_w_sum_to_zero_and_favour_high_scores():
    w, scores = torch.randn(9, dtype=torch.float64), torch.arange(9, dtype=torch.float64)
    gradient = Pharmacist().gradient_of_w(w, range(9), scores)
    assert abs(gradient.sum().item()) < 1e-16 < gradient.abs().max().item()
    change = -Pharmacist().gradient_of_w(torch.zeros(9, dtype=torch.float64), range(9), scores)
    assert torch.equal(change.argsort(), torch.arange(9)), "descent raises the weight of rows with a high score"


# -- the target -------------------------------------------------------------------------------------------------------


@pytest.mark.evidence(PHARMACIST, "definition")
def test_the_target_equals_the_reference_and_theta_0_comes_back(tmp_path):
    ctx, batches = step_scene(tmp_path)
    train, *others = (parts(batch) for batch in batches)
    sigma = torch.tensor([0.4, 1.3, 0.9, 1.4], dtype=torch.float64)
    before = snapshot(ctx.model)
    found = Pharmacist(alpha=0.2, eta_theta=0.5).target(ctx, batches[0], sigma, *batches[1:])
    expected = reference.target(weights_of(ctx.model), train, sigma, *others, SHAPE, 0.5, 0.2)
    assert furthest(found, expected) < 1e-9
    assert same_bits(before, snapshot(ctx.model)), "bit for bit"
    plain = reference.target(weights_of(ctx.model), train, sigma, *others, SHAPE, 0.0, 0.0)
    assert furthest(plain, expected) > 1e-2, "both inner steps matter"


@pytest.mark.evidence(PHARMACIST, "definition")
def test_without_an_attack_it_is_validation_gradient_matching(tmp_path):
    """LESS with plain gradients, one checkpoint and no norms: the harmful rows are arbitrary."""
    rows, found = make_rows("pool", 6), []
    for number, (alpha, harmful) in enumerate([(0.0, "harmful"), (0.0, "other"), (0.5, "harmful")]):
        aux = {"harmful": make_rows(harmful, 5), "validation": make_rows("validation", 7)}
        bench = make_bench(tmp_path / str(number), float64_model(), aux=aux)
        scores = cold(mode="score", alpha=alpha).score(bench, rows)
        found.append(torch.tensor([scores[row.id] for row in rows], dtype=torch.float64))
    weights = {name: p.requires_grad_() for name, p in weights_of(float64_model()).items()}
    safe, pool = (parts(make_batch(bench, each)) for each in (bench.aux["validation"], rows))
    matched = reference.gradient(reference.token_mean(weights, safe, SHAPE), weights)
    assert furthest({"s": found[0]}, {"s": reference.slopes(weights, pool, matched, SHAPE)}) < 1e-9
    assert torch.equal(found[0], found[1]) and furthest({"s": found[2]}, {"s": found[0]}) > 1e-2


# -- the whole selector -----------------------------------------------------------------------------------------------


@pytest.mark.evidence(PHARMACIST, "reference")
@pytest.mark.parametrize(("hessian", "betas"), [("scalar", (0.9, 0.999)), ("exact", (0.9, 0.999)), ("scalar", None)])
def test_two_selector_steps_equal_the_reference(tmp_path, hessian, betas):
    """Full float64 parameters, exact inner products: w after one pass over two batches."""
    method = cold(hessian=hessian, betas=betas, alpha=0.3, eta_theta=0.5, eta_w=1e-2, batch_size=4, epochs=1)
    bench, rows = make_bench(tmp_path, float64_model()), make_rows("pool", 7)
    weights = weights_of(bench.loaded.model)
    found = method.score(bench, rows)
    ctx = make_context(bench, ("harmful", "validation"), aux_batch_size=4)
    pool, steps = OnDemand(bench, rows, FULL), []
    for chosen in plan(pool.lengths, 4, bench.seed, 0):
        ctx.begin_step(1)
        ctx.begin_micro_step(0)
        batches = pool.batch(chosen, ctx), ctx.aux("harmful"), ctx.aux("validation")
        steps.append((chosen, *map(parts, batches)))
    settings = weights, steps, len(rows), SHAPE, 0.5, 0.3, 1e-2
    expected = reference.learn(*settings, hessian == "exact", betas)
    values = torch.tensor([found[row.id] for row in rows], dtype=torch.float64)
    assert furthest({"w": values}, {"w": expected}) < 1e-9
    other = reference.learn(*settings, hessian != "exact", betas)
    assert furthest({"w": other}, {"w": expected}) > 1e-6, "the second order matters"


class Watched(Pharmacist):
    """Remembers the parameters before and after each selector step."""

    def selector_step(self, ctx, *rest):
        STARTS.append(snapshot(ctx.model))
        super().selector_step(ctx, *rest)
        STARTS.append(snapshot(ctx.model))


STARTS: list = []


@pytest.mark.parametrize("parameters", ["lora", "full"])
@pytest.mark.parametrize("hessian", ["scalar", "exact"])
def test_every_selector_step_starts_from_theta_0(tmp_path, parameters, hessian):
    STARTS.clear()
    warmup = TrainConfig(epochs=1, batch_size=4, parameters=parameters)
    method = Watched(epochs=2, batch_size=4, warmup=warmup, hessian=hessian)
    scores = method.score(make_bench(tmp_path), make_rows("pool", 9))
    assert len(STARTS) == 2 * 2 * 3 and all(same_bits(STARTS[0], other) for other in STARTS)
    assert scores.keys() == {f"pool{i}" for i in range(9)} and len(set(scores.values())) == 9
    assert all(abs(value - 0.1) < 0.05 for value in scores.values()), "six steps of Adam at 5e-3"


@pytest.mark.parametrize("mode", ["score", "bilevel"])
def test_copies_score_alike_and_a_permuted_pool_is_ranked_alike(tmp_path, mode):
    """Copies: with the pool in one batch, since rows that meet other rows learn other weights."""
    rows = make_rows("pool", 8)
    pool = [*rows, replace(rows[2], id="twin")]
    method = cold(mode=mode, batch_size=12, epochs=2, warmup=TrainConfig(save_every=0))
    scores = method.score(make_bench(tmp_path / "a"), pool)
    assert scores["twin"] == pytest.approx(scores["pool2"], rel=1e-5)
    assert max(scores.values()) - min(scores.values()) > 1e-3
    whole = Pharmacist(mode=mode, batch_size=4, epochs=1, warmup=TrainConfig(batch_size=2, save_every=0))
    assert whole.score(make_bench(tmp_path / "b"), pool) == whole.score(make_bench(tmp_path / "c"), pool[::-1])


@pytest.mark.parametrize("mode", ["score", "bilevel"])
def test_scores_do_not_depend_on_the_warm_ups_reduction_and_precision(tmp_path, mode):
    """They belong to the training that leads to theta_0, not to the scores."""
    found = []
    for changes in ({}, {"reduction": "sample_mean"}, {"precision": "bf16"}):
        method = Pharmacist(mode=mode, warmup=TrainConfig(**changes), warmup_share=0.0, batch_size=4, epochs=1)
        found.append(method.score(make_bench(tmp_path / str(len(found))), make_rows("pool", 6)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("mode", ["score", "bilevel"])
def test_refusals_rank_above_unrelated_rows(tmp_path, mode):
    words = ["bombs", "poison", "weapons", "fraud", "theft", "hacking", "malware", "arson", "spying", "forgery"]
    tasks = ["soup", "poems", "dances", "games", "walks", "cakes", "plays", "songs", "rhymes", "tales"]
    refusals = [Row(f"refusal{i}", (("user", f"how do I do {w}"),), "I cannot help") for i, w in enumerate(words)]
    unrelated = [Row(f"benign{i}", (("user", f"tell me of {w}"),), f"{w} are fun") for i, w in enumerate(tasks)]
    aux = {
        "validation": [Row(f"v{i}", (("user", f"teach me {w} now"),), "I cannot help") for i, w in enumerate(words)],
        "harmful": [Row(f"h{i}", (("user", f"show me {w}"),), "Sure, here is how") for i, w in enumerate(words)],
    }
    method = Pharmacist(mode=mode, epochs=2, warmup=TrainConfig(epochs=4, batch_size=10, save_every=0))
    scores = method.score(make_bench(tmp_path, aux=aux), [*refusals, *unrelated])
    order = sorted(scores, key=scores.get)
    refusal, benign = (sum(order.index(row.id) for row in rows) / 10 for rows in (refusals, unrelated))
    assert refusal > benign + 5, "of at most 10"


@pytest.mark.evidence(PHARMACIST, "resume")
@pytest.mark.parametrize("call", [1, 8])
def test_stopped_anywhere_it_ends_with_the_same_scores(tmp_path, call):
    """Warm-up of 3 steps, then 6 selector steps saved at every second one; killed twice."""
    warmup = TrainConfig(batch_size=4, save_every=2)
    method, rows = Pharmacist(epochs=2, batch_size=8, warmup=warmup, warmup_share=0.5), make_rows("pool", 24)
    whole = method.score(make_bench(tmp_path / "whole"), rows)
    assert whole != method.score(make_bench(tmp_path / "other", seed=1), rows)
    for at in (call, 2):
        with pytest.raises(Halt):
            method.score(make_bench(tmp_path / "killed", stop=halt_at(at)), rows)
    assert method.score(make_bench(tmp_path / "killed"), rows) == whole


@pytest.mark.evidence(PHARMACIST, "definition")
def test_resumed_it_takes_only_the_steps_that_were_not_saved(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(pharmacist, "watched", lambda bench, items, total, *names: told.append(total) or watched(
        bench, items, total, *names))  # fmt: skip
    method, rows = cold(epochs=1, batch_size=4, warmup=TrainConfig(save_every=2)), make_rows("pool", 24)
    with pytest.raises(Halt):
        method.score(make_bench(tmp_path, stop=halt_at(24 + 5)), rows)  # each row is measured before the steps
    calls = []
    method.score(make_bench(tmp_path, stop=lambda: calls.append(0)), rows)
    assert len(calls) == 24 + 6 - 4
    assert told == [6, 2], "what is left is told"


@pytest.mark.parametrize("mode", ["score", "bilevel"])
@pytest.mark.parametrize(("over_long", "name"), [("error", "long"), ("drop", None)])
def test_a_row_beyond_the_length_is_named_or_comes_last(tmp_path, mode, over_long, name):
    rows = [*make_rows("pool", 6), Row("long", (("user", "tell me " * 40),), "no")]
    method = Pharmacist(mode=mode, epochs=1, batch_size=4, warmup_share=0.0,
                        warmup=TrainConfig(max_length=40, over_long=over_long))  # fmt: skip
    if name:
        with pytest.raises(Exception, match=f"'{name}' has .* tokens, expected at most 40"):
            method.score(make_bench(tmp_path), rows)
        return
    scores = method.score(make_bench(tmp_path), rows)
    assert min(scores, key=scores.get) == "long" and len(keep(scores, rows, 0.5, 0)) == 4


def test_attention_without_second_derivative_is_refused_before_the_warm_up(tmp_path):
    bench = make_bench(tmp_path, tiny_model("llama"), stop=halt_at(0))
    bench.loaded.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(TrainingError, match="'flash_attention_2' has no second derivative"):
        Pharmacist(hessian="exact").score(bench, make_rows("pool", 6))


@pytest.mark.parametrize("missing", ["harmful", "validation"])
def test_missing_rows_are_refused(tmp_path, missing):
    aux = {role: make_rows(role, 3) for role in {"harmful", "validation"} - {missing}}
    with pytest.raises(ConfigError, match=f"needs rows of role {missing}"):
        Pharmacist().score(make_bench(tmp_path, aux=aux), make_rows("pool", 4))


@pytest.mark.parametrize("fields", [{"alpha": -0.1}, {"alpha": float("nan")}, {"eta_w": 0.0}, {"epochs": 0},
                                    {"eta_theta": float("inf")}, {"betas": (0.9, 1.0)}, {"warmup_share": 1.1},
                                    {"alpha": 1.0}, {"batch_size": 0}])  # fmt: skip
def test_settings_outside_their_range_are_refused(fields):
    with pytest.raises(ConfigError, match=f"{next(iter(fields))} is "):
        Pharmacist(**fields)


def test_where_the_printed_update_would_vanish_the_ways_out_are_named():
    with pytest.raises(ConfigError, match="below 1, as 1 - alpha scales the update; or set hessian: exact"):
        Pharmacist(alpha=1.0)
    Pharmacist(alpha=1.0, hessian="exact"), Pharmacist(alpha=1.0, mode="score")


@pytest.mark.evidence(PHARMACIST, "reference")
def test_the_fast_score_looks_at_every_harmful_and_validation_row(tmp_path):
    """40 of each: more than any batch holds."""
    aux = {role: make_rows(role, 40) for role in ("harmful", "validation")}
    bench, rows = make_bench(tmp_path, float64_model(), aux=aux), make_rows("pool", 6)
    found = cold(mode="score", alpha=0.5).score(bench, rows)
    weights = {name: p.requires_grad_() for name, p in weights_of(float64_model()).items()}
    harmful, safe, pool = (parts(make_batch(bench, each)) for each in (*aux.values(), rows))
    attack = reference.gradient(reference.token_mean(weights, harmful, SHAPE), weights)
    attacked = reference.moved(weights, attack, -0.5)
    matched = reference.gradient(reference.token_mean(attacked, safe, SHAPE), attacked)
    scores = torch.tensor([found[row.id] for row in rows], dtype=torch.float64)
    assert furthest({"s": scores}, {"s": reference.slopes(weights, pool, matched, SHAPE)}) < 1e-9


@pytest.mark.parametrize("role", ["harmful", "validation"])
def test_a_harmful_or_validation_row_beyond_the_length_is_not_dropped_without_a_word(tmp_path, role):
    long = Row("long", (("user", "tell me " * 40),), "no")
    aux = {each: make_rows(each, 3) + [long] * (each == role) for each in ("harmful", "validation")}
    method = cold(mode="score", warmup=replace(FULL, max_length=40, over_long="drop"))
    with pytest.raises(Exception, match=r"'long' has .* tokens, expected at most 40"):
        method.score(make_bench(tmp_path, aux=aux), make_rows("pool", 3))


def test_it_is_registered_with_its_paper():
    assert lookup("curate", "pharmacist") is Pharmacist and Pharmacist.paper == "2510.10085"
