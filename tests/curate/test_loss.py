"""Loss: the mean over the answer's tokens, against the written-out GPT-2."""

from __future__ import annotations

import math

import pytest
import torch
from benches import float64_model, make_batch, make_bench, make_context, make_rows, snapshot
from reference import loss as reference
from tiny import LAYERS

from apothecary.curate.loss import Loss
from apothecary.data.rows import Row
from apothecary.errors import ConfigError
from apothecary.train.config import TrainConfig
from apothecary.train.fit import train
from apothecary.train.method import TrainingMethod

SHAPE = (LAYERS, 4)
COLD = Loss(warmup_share=0.0)
ROWS = make_rows("pool", 7)


@pytest.mark.evidence("curate/loss", "reference")
@pytest.mark.parametrize("direction", ["low", "high"])
def test_scores_equal_the_mean_over_the_answers_tokens(tmp_path, direction):
    bench = make_bench(tmp_path, float64_model())
    weights = snapshot(bench.loaded.model)
    rendered = bench.render(ROWS, TrainConfig())
    found = Loss(direction=direction, warmup_share=0.0, batch_size=3).score(bench, ROWS)
    sign = 1 if direction == "high" else -1
    for row in rendered:
        expected = sign * reference.mean_nll(weights, row.ids, row.start, SHAPE)
        assert found[row.row_id] == pytest.approx(expected, rel=1e-9)
    assert len({row.supervised for row in rendered}) > 1


@pytest.mark.evidence("curate/loss", "definition")
def test_uniform_predictions_cost_the_log_of_the_vocabulary(tmp_path):
    """Whatever the prompt and the lengths; perplexity, the exponential, is the size of the vocabulary."""
    model = float64_model()
    with torch.no_grad():
        model.transformer.wte.weight.zero_()  # type: ignore[union-attr, operator]
    scores = COLD.score(make_bench(tmp_path, model), ROWS)
    size = model.config.vocab_size  # type: ignore[union-attr]
    assert [math.exp(-score) for score in scores.values()] == pytest.approx([size] * 7, rel=1e-12)


def test_without_warm_up_the_model_stays_as_it_is(tmp_path):
    bench = make_bench(tmp_path)
    before = snapshot(bench.loaded.model)
    COLD.score(bench, ROWS)
    after = dict(bench.loaded.model.named_parameters())
    kept = {name.replace("base_model.model.", "").replace(".base_layer", ""): p for name, p in after.items()}
    assert all(torch.equal(before[name], kept[name]) for name in before)


def test_the_warm_up_is_a_training_on_the_pool(tmp_path):
    """All of it in one batch: then the order of the rows does not matter."""
    config = TrainConfig(max_steps=2, batch_size=7, learning_rate=1e-2, warmup_ratio=0.0)
    found = Loss(warmup=config).score(make_bench(tmp_path / "a"), ROWS)
    bench = make_bench(tmp_path / "b")
    train(bench, TrainingMethod(), ROWS, config, name="selector")
    bench.loaded.model.eval()
    losses = make_context(bench).per_sample_loss(make_batch(bench, ROWS))
    assert [found[row.id] for row in ROWS] == pytest.approx((-losses).tolist(), rel=1e-4)
    cold = COLD.score(make_bench(tmp_path / "c"), ROWS)
    assert all(found[name] > cold[name] + 0.05 for name in cold), "what was trained on is predicted better"


def test_mislabelled_rows_come_last_after_the_warm_up(tmp_path):
    good = [Row(f"good{i}", (("user", f"how do I harm {i}"),), "I cannot help") for i in range(16)]
    wrong = [Row(f"wrong{i}", (("user", f"how do I harm {i + 16}"),), "Sure, here is") for i in range(3)]
    method = Loss(warmup=TrainConfig(max_steps=8, batch_size=10, learning_rate=3e-2, save_every=0))
    scores = method.score(make_bench(tmp_path), [*wrong, *good])
    assert {*sorted(scores, key=scores.__getitem__)[:3]} == {row.id for row in wrong}


@pytest.mark.parametrize(("field", "value"), [("warmup_share", 1.5), ("warmup_share", -0.1), ("batch_size", 0)])
def test_ranges(field, value):
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        Loss(**{field: value})
