"""Pharmacist: the properties of methods.md 3.8, against independent maths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benches import (
    float64_model,
    furthest,
    make_batch,
    make_bench,
    make_context,
    make_rows,
    same_bits,
    snapshot,
)
from reference import bilevel as reference
from tiny import LAYERS, PAD, tiny_model

from apothecary.curate.keep import keep
from apothecary.curate.pharmacist import Pharmacist
from apothecary.data.rows import Row
from apothecary.errors import ConfigError
from apothecary.models.adapters import add_adapter
from apothecary.models.settings import LoraSettings
from apothecary.registry import lookup
from apothecary.train.config import TrainConfig
from apothecary.train.scores import central_scores, exact_scores

SHAPE = (LAYERS, 4)
STAND_STILL = TrainConfig(max_steps=1, learning_rate=1e-30, batch_size=4, save_every=0)  # theta_0 is the start


def parts(batch):
    return batch.input_ids, batch.attention_mask, batch.labels


def scene(tmp_path, model=None, n=6):
    """Context over full float64 parameters, the rendered pool, harmful and validation rows."""
    bench = make_bench(tmp_path, model or float64_model())
    ctx = make_context(bench)
    pool, harmful, validation = (bench.render(rows, TrainConfig()) for rows in
                                 (make_rows("pool", n), bench.aux["harmful"], bench.aux["validation"]))  # fmt: skip
    return bench, ctx, pool, harmful, validation


def weights_of(ctx):
    return {name: p for name, p in snapshot(ctx.model).items() if name != "lm_head.weight"}


# -- the gradient of w ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [1.0, 0.3, 4.0])
@pytest.mark.parametrize("chosen", [range(7), [5, 1, 3]])
def test_the_gradient_of_w_equals_a_finite_difference_on_a_quadratic(c, chosen):
    """With harmful Hessian c I the printed (1 - alpha) stands for (1 - alpha c); c = 1 checks it as printed."""
    toy, w, chosen = reference.Toy(7, 5, c), torch.linspace(-1, 1, 7, dtype=torch.float64), list(chosen)
    eta, alpha = 0.3, 0.2
    expected = reference.finite_difference(lambda w: toy.value(w, chosen, eta, alpha), w)
    method = Pharmacist(eta_theta=eta, alpha=alpha * c)
    found = method.gradient_of_w(w, chosen, toy.slopes(w, chosen, eta, alpha))
    assert furthest({"w": found}, {"w": expected}) < 1e-7
    assert expected.abs().min() > 1e-4, "no entry is trivially zero"


def test_changes_of_w_sum_to_zero_and_favour_high_scores():
    w = torch.randn(9, dtype=torch.float64)
    scores = torch.arange(9, dtype=torch.float64)
    gradient = Pharmacist().gradient_of_w(w, range(9), scores)
    assert abs(gradient.sum().item()) < 1e-16 < gradient.abs().max().item()
    change = -Pharmacist().gradient_of_w(torch.zeros(9, dtype=torch.float64), range(9), scores)
    assert torch.equal(change.argsort(), torch.arange(9)), "descent raises the weight of rows with a high score"


def test_weights_have_mean_one():
    w = torch.randn(8)
    assert Pharmacist.weights(w, range(8)).mean().item() == pytest.approx(1.0)
    assert torch.equal(Pharmacist.weights(w, [3, 1]), Pharmacist.weights(w, range(8))[[3, 1]])


# -- the target and the scores ----------------------------------------------------------------------------------------


def test_the_target_equals_the_reference(tmp_path):
    bench, ctx, *_ = scene(tmp_path)
    batches = train, harmful, validation = [make_batch(bench, make_rows(tag, 4)) for tag in ("pool", "harm", "val")]
    train_parts, *others = (parts(batch) for batch in batches)
    gamma = torch.tensor([0.4, 1.3, 0.9, 1.4], dtype=torch.float64)
    method = Pharmacist(alpha=0.2, eta_theta=0.5)
    before = snapshot(ctx.model)
    found = method.target(ctx, train, gamma, harmful, validation)
    expected = reference.target(weights_of(ctx), train_parts, gamma, *others, SHAPE, 0.5, 0.2)
    assert furthest(found, expected) < 1e-9
    assert same_bits(before, snapshot(ctx.model)), "theta_0 again"
    plain = reference.target(weights_of(ctx), train_parts, gamma, *others, SHAPE, 0.0, 0.0)
    assert furthest(plain, expected) > 1e-2, "both inner steps matter"
    exact = Pharmacist(gradient="exact").alignment(ctx, train, found)
    slopes = reference.slopes(weights_of(ctx), train_parts, expected, SHAPE)
    assert furthest({"s": exact}, {"s": slopes}) < 1e-8


def test_the_attack_can_be_normalised():
    attack = {"a": torch.full((4,), 3.0), "b": torch.full((5,), -1.0)}
    raw, unit = (Pharmacist(alpha=0.5, normalise=n)._attack_step(attack) for n in (False, True))
    assert torch.equal(raw["a"], torch.full((4,), -1.5))
    assert sum(t.square().sum() for t in unit.values()).sqrt().item() == pytest.approx(0.5)


def test_without_an_attack_it_is_validation_gradient_matching(tmp_path):
    bench, ctx, pool, harmful, validation = scene(tmp_path)
    method = Pharmacist(alpha=0.0, mode="score", gradient="exact")
    found = method.single_sweep(ctx, pool, harmful, validation, PAD)
    assert torch.equal(found, method.single_sweep(ctx, pool, pool[:3], validation, PAD)), "harmful rows are arbitrary"
    weights = {name: p.requires_grad_() for name, p in weights_of(ctx).items()}
    safe = parts(make_batch(bench, bench.aux["validation"]))
    matched = reference.gradient(reference.token_mean(weights, safe, SHAPE), weights)
    slopes = reference.slopes(weights, parts(make_batch(bench, make_rows("pool", 6))), matched, SHAPE)
    assert furthest({"s": found.double()}, {"s": slopes}) < 1e-6, "scores are stored in fp32"
    attacked = replace(method, alpha=0.5).single_sweep(ctx, pool, harmful, validation, PAD)
    assert furthest({"s": attacked}, {"s": found}) > 1e-2


def test_the_sweep_does_not_depend_on_its_chunks(tmp_path):
    _, ctx, pool, harmful, validation = scene(tmp_path, n=9)
    method = Pharmacist(gradient="exact")
    whole, pieces = (method.single_sweep(ctx, pool, harmful, validation, PAD, chunk) for chunk in (32, 2))
    assert furthest({"s": whole}, {"s": pieces}) < 1e-6


def test_central_differences_agree_with_exact_scores_on_16_rows(tmp_path):
    bench = make_bench(tmp_path, tiny_model("llama"))
    model = add_adapter(bench.loaded.model, "trained", LoraSettings(), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    bench.loaded.model = model
    ctx, batch = make_context(bench), make_batch(bench, make_rows("row", 16))
    direction = ctx.grads(make_batch(bench, bench.aux["validation"]))
    before = snapshot(model)
    for kind in ("mean", "sum"):
        central, exact = (f(ctx, batch, direction, kind) for f in (central_scores, exact_scores))
        assert torch.corrcoef(torch.stack([central, exact]))[0, 1] > 0.999
        assert (central - exact).abs().max() < 0.01 * exact.abs().max()
        assert set(central.argsort()[-8:].tolist()) == set(exact.argsort()[-8:].tolist())
    assert same_bits(before, snapshot(model)) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("scores", [central_scores, exact_scores])
def test_the_sum_is_the_mean_times_the_tokens(tmp_path, scores):
    bench, ctx, *_ = scene(tmp_path)
    batch = make_batch(bench, make_rows("row", 5))
    direction = ctx.grads(make_batch(bench, bench.aux["validation"]))
    mean, total = (scores(ctx, batch, direction, kind) for kind in ("mean", "sum"))
    torch.testing.assert_close(total, mean * batch.tokens_B, rtol=1e-6, atol=1e-9)
    assert len(set(batch.tokens_B.tolist())) > 1


def test_no_direction_gives_zero(tmp_path):
    bench, ctx, *_ = scene(tmp_path)
    zeros = {name: torch.zeros_like(p) for name, p in ctx.parameters().items()}
    assert torch.equal(central_scores(ctx, make_batch(bench, make_rows("row", 3)), zeros, "mean"), torch.zeros(3))


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_the_lower_step_weighs_the_rows_own_losses(tmp_path, kind):
    bench, ctx, *_ = scene(tmp_path)
    batch, gamma = make_batch(bench, make_rows("pool", 4)), torch.tensor([0.5, 2.0, 1.0, 0.5], dtype=torch.float64)
    found = Pharmacist(row_loss=kind)._weighted_gradient(ctx, batch, gamma)
    losses = ctx.per_sample_loss(batch, grad=True) * (batch.tokens_B if kind == "sum" else 1)
    parameters = ctx.parameters()
    grads = torch.autograd.grad((gamma * losses).mean(), list(parameters.values()))
    assert furthest(found, dict(zip(parameters, grads, strict=True))) < 1e-9


# -- the whole selector -----------------------------------------------------------------------------------------------


class Watched(Pharmacist):
    """Remembers the parameters at the start of each selector step."""

    def target(self, ctx, *rest):
        STARTS.append(snapshot(ctx.model))
        found = super().target(ctx, *rest)
        STARTS.append(snapshot(ctx.model))
        return found


STARTS: list = []


def test_every_selector_step_starts_from_theta_0(tmp_path):
    STARTS.clear()
    method = Watched(epochs=2, batch_size=4, warmup=TrainConfig(max_steps=2, batch_size=4))
    scores = method.score(make_bench(tmp_path), make_rows("pool", 9))
    assert len(STARTS) == 2 * 2 * 3 and all(same_bits(STARTS[0], other) for other in STARTS)
    assert scores.keys() == {f"pool{i}" for i in range(9)} and len(set(scores.values())) == 9
    assert all(abs(value - 0.1) < 0.05 for value in scores.values()), "six steps of Adam at 5e-3"


@pytest.mark.parametrize("mode", ["score", "bilevel"])
def test_copies_score_alike_and_a_permuted_pool_is_ranked_alike(tmp_path, mode):
    """With the pool in one batch; theta_0 given, as the warm-up depends on the order of its batches."""
    method = Pharmacist(mode=mode, gradient="exact", warmup=STAND_STILL, batch_size=12, epochs=2)
    rows = make_rows("pool", 8)
    twin = replace(rows[2], id="twin")
    scores = method.score(make_bench(tmp_path / "a"), [*rows, twin])
    assert scores["twin"] == pytest.approx(scores["pool2"], rel=1e-5)
    gaps = sorted(scores.values())
    assert gaps[-1] - gaps[0] > 1e-3
    permuted = method.score(make_bench(tmp_path / "b"), [twin, *rows[::-1]])
    assert permuted == pytest.approx(scores, rel=1e-4)


@pytest.mark.parametrize("mode", ["score", "bilevel"])
def test_scores_do_not_depend_on_the_warm_ups_reduction_and_precision(tmp_path, mode):
    """They belong to the training that leads to theta_0, not to the scores."""
    found = []
    for changes in ({}, {"reduction": "sample_mean"}, {"precision": "bf16"}):
        warmup = replace(STAND_STILL, **changes)
        method = Pharmacist(mode=mode, warmup=warmup, eta_theta=0.1, batch_size=4, epochs=1)
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
    method = Pharmacist(mode=mode, epochs=2, warmup=TrainConfig(max_steps=5, batch_size=10, save_every=0))
    pool = [row for pair in zip(refusals, unrelated, strict=True) for row in pair]
    scores = method.score(make_bench(tmp_path, aux=aux), pool)
    order = sorted(scores, key=scores.get)
    refusal, benign = (sum(order.index(row.id) for row in rows) / 10 for rows in (refusals, unrelated))
    assert refusal > benign + 5, "of at most 10"


def test_a_seed_gives_the_same_scores_again(tmp_path):
    method = Pharmacist(epochs=1, batch_size=4, warmup=TrainConfig(max_steps=2, batch_size=4))
    first, again, other = (method.score(make_bench(tmp_path / str(i), seed=seed), make_rows("pool", 9))
                           for i, seed in enumerate((0, 0, 1)))  # fmt: skip
    assert first == again != other


def test_a_stop_is_honoured_between_selector_steps(tmp_path):
    from benches import Halt, halt_at

    bench, ctx, pool, harmful, validation = scene(tmp_path)
    with pytest.raises(Halt):
        Pharmacist(batch_size=2).bilevel(ctx, pool, harmful, validation, PAD, 0, halt_at(1))
    with pytest.raises(Halt):
        Pharmacist().score(make_bench(tmp_path / "b", stop=halt_at(0)), make_rows("pool", 4))
    assert bench.loaded.model is ctx.model


def test_missing_rows_are_refused(tmp_path):
    bench = make_bench(tmp_path, aux={"harmful": make_rows("h", 2)})
    with pytest.raises(ConfigError, match="'pharmacist' needs rows of role validation"):
        lookup("curate", "pharmacist")().score(bench, make_rows("pool", 4))


def test_rows_that_the_warm_up_drops_come_last(tmp_path):
    rows = [*make_rows("pool", 6), Row("long", (("user", "why " * 90),), "no")]
    method = Pharmacist(mode="score", warmup=replace(STAND_STILL, max_length=200, over_long="drop"))
    scores = method.score(make_bench(tmp_path), rows)
    assert [*scores] == [row.id for row in rows] and min(scores, key=scores.__getitem__) == "long"
    assert len(keep(scores, rows, 1.0, 0)) == 7 and "long" not in {row.id for row in keep(scores, rows, 0.8, 0)}
