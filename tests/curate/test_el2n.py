"""EL2N: the norm of the error vector at early checkpoints."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benches import float64_model, make_batch, make_bench, make_context, make_rows
from reference import influence as reference
from tiny import LAYERS, VOCAB

from apothecary.curate.el2n import El2n, errors
from apothecary.data.rows import Row
from apothecary.errors import ConfigError
from apothecary.models.settings import LoraSettings
from apothecary.train.config import TrainConfig

SHAPE = (LAYERS, 4)
POOL = make_rows("pool", 6)
WARM = TrainConfig(learning_rate=1e-2, max_steps=3, batch_size=64, schedule="constant", warmup_ratio=0.0,
                   max_grad_norm=0.0, save_every=0, parameters="full")  # fmt: skip


@pytest.mark.evidence("curate/el2n", "reference", "definition")
def test_it_equals_the_reference(tmp_path):
    bench = make_bench(tmp_path, float64_model())
    base = {name: p.detach().clone() for name, p in bench.loaded.model.named_parameters() if name != "lm_head.weight"}
    batch = make_batch(bench, POOL)
    pool = batch.input_ids, batch.attention_mask, batch.labels
    points = list(reference.adam(base, lambda w: reference.token_mean(w, pool, SHAPE), [1e-2] * 3, WARM.betas))
    found = El2n(checkpoints=3, warmup=WARM).score(bench, POOL)
    expected = reference.el2n(points, pool, lambda weights: weights, SHAPE)
    assert list(found) == [row.id for row in POOL]
    torch.testing.assert_close(torch.tensor(list(found.values()), dtype=torch.float64), expected, rtol=1e-9, atol=0)
    last = reference.el2n(points[-1:], pool, lambda weights: weights, SHAPE)
    assert (last - expected).abs().max() > 1e-2, "the final model alone would say something else"
    low = El2n(direction="low", checkpoints=3, warmup=WARM).score(make_bench(tmp_path / "low", float64_model()), POOL)
    assert low == pytest.approx({name: -score for name, score in found.items()})


@pytest.mark.evidence("curate/el2n", "definition")
def test_a_right_answer_has_no_error_and_a_wrong_one_the_square_root_of_two(tmp_path):
    batch = make_batch(make_bench(tmp_path), make_rows("row", 4))
    sure = torch.zeros(*batch.input_ids.shape, VOCAB)
    sure[:, :-1].scatter_(2, batch.input_ids[:, 1:, None], 1e3)
    assert torch.equal(errors(sure, batch), torch.zeros(4))
    torch.testing.assert_close(errors(sure.roll(1, 2), batch), torch.full((4,), 2**0.5))
    even = torch.zeros_like(sure)
    torch.testing.assert_close(errors(even, batch), torch.full((4,), (1 - 1 / VOCAB) ** 0.5))
    assert errors(even.bfloat16(), batch).dtype == torch.float32


def test_prompts_and_padding_do_not_count(tmp_path):
    bench = make_bench(tmp_path)
    ctx, rows = make_context(bench), make_rows("row", 4)
    batch = make_batch(bench, rows)
    logits = ctx.forward(batch, grad=False).logits
    found = errors(logits, batch)
    outside = torch.cat([batch.labels[:, 1:] < 0, torch.ones(4, 1, dtype=torch.bool)], 1)
    assert torch.equal(errors(torch.where(outside[..., None], torch.full_like(logits, 7.0), logits), batch), found)
    alone = [errors(ctx.forward(one, grad=False).logits, one)[0] for one in (make_batch(bench, [row]) for row in rows)]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-5, atol=1e-6)


def test_what_the_warm_up_teaches_has_smaller_errors(tmp_path):
    """Rows with one common answer are learnt first; two rows that contradict them keep a large error."""
    common = [Row(f"c{i}", (("user", f"say yes {i}"),), "yes") for i in range(10)]
    odd = [Row(f"o{i}", (("user", f"say yes {i}"),), "qzj") for i in range(2)]
    warm = TrainConfig(learning_rate=1e-2, max_steps=12, batch_size=12, save_every=0, lora=LoraSettings(rank=4))
    scores = El2n(checkpoints=2, warmup=warm).score(make_bench(tmp_path), [*common, *odd])
    assert min(scores[row.id] for row in odd) > max(scores[row.id] for row in common)


def test_a_row_dropped_for_its_length_comes_last(tmp_path):
    rows = [*POOL, Row("long", (("user", "a " * 300),), "yes")]
    for direction in ("high", "low"):
        method = El2n(direction=direction, checkpoints=1, warmup=replace(WARM, over_long="drop", max_steps=1))
        scores = method.score(make_bench(tmp_path / direction), rows)
        assert scores["long"] == float("-inf") and min(scores[row.id] for row in POOL) > -2


@pytest.mark.parametrize("fields", [{"checkpoints": 0}, {"batch_size": 0}])
def test_settings_outside_their_ranges_are_refused(fields):
    with pytest.raises(ConfigError, match="at least 1"):
        El2n(**fields)
