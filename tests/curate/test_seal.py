"""SEAL: the tests of methods.md 5.5, its reference issues, and two epochs against independent maths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benches import Halt, float64_model, furthest, halt_at, make_bench, make_context, make_rows, same_bits, snapshot
from reference import seal as reference
from tiny import LAYERS

from apothecary.curate.seal import Seal, WeightedTraining
from apothecary.data.batching import plan
from apothecary.data.rows import Row
from apothecary.errors import ConfigError
from apothecary.models.settings import LoraSettings
from apothecary.registry import lookup
from apothecary.train.config import TrainConfig
from apothecary.train.on_demand import OnDemand
from apothecary.train.row_weights import sigma

SHAPE = (LAYERS, 4)
SEAL = "curate/seal"


def theta(**changes):
    """Full parameters and a plain optimiser."""
    return TrainConfig(**({"learning_rate": 1e-2, "epochs": 2, "batch_size": 4, "schedule": "constant",
                           "warmup_ratio": 0.0, "parameters": "full", "max_grad_norm": 0.0, "save_every": 0,
                           "reduction": "sample_mean"} | changes))  # fmt: skip


def weights_of(model):
    return {name: p for name, p in snapshot(model).items() if name != "lm_head.weight"}


def parts(batch):
    return batch.input_ids, batch.attention_mask, batch.labels


# -- the mathematics --------------------------------------------------------------------------------------------------


@pytest.mark.evidence(SEAL, "reference")
@pytest.mark.parametrize("clip", [10.0, 0.05])
def test_two_epochs_equal_the_reference(tmp_path, clip):
    """Four steps of theta and w, with ul falling in between; the second clip binds."""
    method = Seal(ul=0.8, ul_decay=0.3, eta_w=1e-2, clip=clip, theta=theta(betas=(0.8, 0.95)))
    bench, rows = make_bench(tmp_path, float64_model()), make_rows("pool", 7)
    before = weights_of(bench.loaded.model)
    found = method.score(bench, rows)
    after = weights_of(bench.loaded.model)
    ctx, pool, steps = make_context(bench, ("validation",), **vars(method.theta)), OnDemand(bench, rows, theta()), []
    for epoch in range(2):
        for chosen in plan(pool.lengths, 4, bench.seed, epoch):
            ctx.begin_step(1)
            ctx.begin_micro_step(0)
            steps.append((chosen, parts(pool.batch(chosen, ctx)), parts(ctx.aux("validation"))))
    rest = 2, (1e-2, 1e-2), (0.8, 0.95), (0.9, 0.95), clip
    expected, w = reference.train(before, steps, len(rows), SHAPE, 0.8, 0.3, *rest)
    assert furthest({"w": torch.tensor([found[row.id] for row in rows], dtype=torch.float64)}, {"w": w}) < 1e-9
    assert furthest(after, expected) < 1e-9 and furthest(after, before) > 1e-3
    steady, _ = reference.train(before, steps, len(rows), SHAPE, 0.8, 0.0, *rest)
    assert furthest(steady, expected) > 1e-4, "the decay matters"


@pytest.mark.evidence(SEAL, "definition")
def test_equal_losses_leave_the_weights_uniform(tmp_path):
    """With the pool in one batch: a row that waits for its batch gains on those that were in one."""
    rows = [replace(make_rows("pool", 3)[2], id=f"copy{i}") for i in range(6)]
    scores = Seal(theta=theta(batch_size=6)).score(make_bench(tmp_path, float64_model()), rows)
    assert list(scores.values()) == pytest.approx([0.1] * 6, abs=1e-6)


@pytest.mark.evidence(SEAL, "definition")
def test_weights_add_up_to_the_number_of_rows(tmp_path):
    scores = Seal(eta_w=0.1, theta=theta()).score(make_bench(tmp_path), make_rows("pool", 9))
    w = torch.tensor(list(scores.values()), dtype=torch.float64)
    assert w.std() > 0.01 and sigma(w, range(9)).sum().item() == pytest.approx(9.0)


@pytest.mark.evidence(SEAL, "definition")
def test_harmful_rows_of_a_mixture_end_with_lower_weights(tmp_path):
    words = ["bombs", "poison", "weapons", "fraud", "theft", "hacking", "malware", "arson"]
    safe = [Row(f"safe{i}", (("user", f"how do I do {w}"),), "I cannot help") for i, w in enumerate(words)]
    harmful = [Row(f"harm{i}", (("user", f"how do I do {w} now"),), "Sure, here is") for i, w in enumerate(words)]
    aux = {"validation": [Row(f"v{i}", (("user", f"teach me {w}"),), "I cannot help") for i, w in enumerate(words)]}
    scores = Seal(theta=theta(epochs=4, batch_size=8)).score(make_bench(tmp_path, aux=aux), [*safe, *harmful])
    assert max(scores[row.id] for row in harmful) < min(scores[row.id] for row in safe)


def test_the_upper_weight_falls_by_epochs_and_not_below_zero():
    places = {str(i): i for i in range(7)}
    training = WeightedTraining(Seal(ul=0.5, ul_decay=0.3, theta=theta(batch_size=4)), places)
    assert [training.upper_weight(steps) for steps in range(7)] == [0.5, 0.5, 0.2, 0.2, 0.0, 0.0, 0.0]


# -- reference issues -------------------------------------------------------------------------------------------------


@pytest.mark.evidence(SEAL, "definition")
def test_scores_go_with_ids_through_filtering_and_any_order(tmp_path):
    """The authors' code numbers weights after over-long rows are gone and picks rows by their number before."""
    rows = make_rows("pool", 7)
    method = Seal(theta=theta(max_length=40, over_long="drop"))
    scores = method.score(make_bench(tmp_path / "a"), rows)
    long = Row("a-long", (("user", "tell me " * 40),), "no")
    filtered = method.score(make_bench(tmp_path / "b"), [*rows[::-1], long])
    assert filtered.pop("a-long") == float("-inf") and filtered == scores and len(set(scores.values())) == 7


def test_the_pool_is_gone_through_whole_however_few_safe_rows_there_are(tmp_path):
    """Two loaders that are zipped end with the shorter one."""
    seen: list[str] = []

    class Watched(WeightedTraining):
        def step(self, ctx, batch, state):
            seen.extend(batch.row_ids)
            return super().step(ctx, batch, state)

    from apothecary.train.fit import train

    bench = make_bench(tmp_path, aux={"validation": make_rows("validation", 2)})
    rows = make_rows("pool", 9)
    training = Watched(Seal(theta=theta()), {row.id: i for i, row in enumerate(rows)})
    learnt = train(bench, training, rows, theta(epochs=3)).state
    assert sorted(seen) == sorted(3 * [row.id for row in rows]) and learnt["steps"] == 9


def test_at_ul_one_theta_does_not_see_the_pool_and_weights_move_all_the_same(tmp_path):
    """As in the authors' first epoch."""
    models, scores = [], []
    for answer in ("no", "oh"):
        bench = make_bench(tmp_path / answer, float64_model())
        rows = [replace(row, response=answer) for row in make_rows("pool", 6)]
        scores.append(Seal(ul_decay=0.0, theta=theta(epochs=1)).score(bench, rows))
        models.append(weights_of(bench.loaded.model))
    assert furthest(*models) < 1e-10
    assert scores[0] != scores[1] and len(set(scores[0].values())) == 6


def test_a_step_is_one_forward_and_one_backward(tmp_path):
    """Where both batches have one width; else padding would cost more than a second forward."""
    safe, pool = ([Row(f"{tag}{i}", (("user", f"why {i}"),), "no") for i in range(8)] for tag in ("safe", "pool"))
    bench, calls = make_bench(tmp_path, aux={"validation": safe}), []
    handle = bench.loaded.model.register_forward_hook(lambda *_: calls.append(0))
    Seal(theta=theta(epochs=1)).score(bench, pool)
    handle.remove()
    assert len(calls) == 2


# -- the whole selector -----------------------------------------------------------------------------------------------


@pytest.mark.evidence(SEAL, "resume")
@pytest.mark.parametrize(("parameters", "calls"), [("lora", (3, 2)), ("full", (5, 0))])
def test_stopped_anywhere_it_ends_with_the_same_scores(tmp_path, parameters, calls):
    config = theta(parameters=parameters, save_every=2, lora=LoraSettings(dropout=0.1))
    method, rows = Seal(ul=0.5, theta=config), make_rows("pool", 11)
    whole, weights = make_bench(tmp_path / "whole"), []
    scores = method.score(whole, rows)
    for call in calls:
        with pytest.raises(Halt):
            method.score(make_bench(tmp_path / "killed", stop=halt_at(call)), rows)
    again = make_bench(tmp_path / "killed")
    assert method.score(again, rows) == scores
    weights = [snapshot(bench.loaded.model) for bench in (whole, again)]
    assert same_bits(*weights)


@pytest.mark.evidence(SEAL, "definition", "accumulation")
def test_micro_batches_change_nothing(tmp_path):
    found = []
    for accumulation in (1, 3):
        method = Seal(ul=0.6, theta=theta(accumulation=accumulation))
        scores = method.score(make_bench(tmp_path / str(accumulation), float64_model()), make_rows("pool", 9))
        found.append(torch.tensor(list(scores.values()), dtype=torch.float64))
    assert furthest({"w": found[1]}, {"w": found[0]}) < 1e-9


def test_the_defaults_are_those_of_the_authors_script(tmp_path):
    """q and v projections, as Llama names them; the learning rate is for a large model."""
    method = Seal()
    assert (method.ul, method.ul_decay, method.eta_w, method.init, method.betas) == (1.0, 0.03, 5e-3, 0.1, (0.9, 0.95))
    config = method.theta
    assert (config.learning_rate, config.epochs, config.batch_size, config.lora.scale) == (1e-5, 3, 64, 1.0)
    scores = replace(method, theta=replace(config, epochs=1)).score(make_bench(tmp_path), make_rows("pool", 5))
    assert len(set(scores.values())) > 1


def test_it_needs_safe_rows_and_is_registered_with_its_paper(tmp_path):
    assert lookup("curate", "seal") is Seal and Seal.paper == "2410.07471"
    with pytest.raises(ConfigError, match="'seal' needs rows of role validation"):
        Seal().score(make_bench(tmp_path, aux={"harmful": make_rows("h", 2)}), make_rows("pool", 4))


@pytest.mark.parametrize("fields", [{"ul": 1.1}, {"ul_decay": -0.1}, {"eta_w": 0.0}, {"clip": 0.0},
                                    {"betas": (0.9, 1.0)}, {"theta": TrainConfig()}])  # fmt: skip
def test_settings_outside_their_range_are_refused(fields):
    with pytest.raises(ConfigError, match=f"{next(iter(fields))}(.reduction)? is "):
        Seal(**fields)
