"""Post-attack match: its score against independent maths, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benches import Halt, float64_model, furthest, halt_at, make_batch, make_bench, make_rows, same_bits, snapshot
from reference import bilevel as reference
from tiny import LAYERS

from apothecary.curate.post_attack_match import PostAttackMatch
from apothecary.errors import ConfigError
from apothecary.registry import lookup
from apothecary.train.config import TrainConfig

MATCH = "curate/post_attack_match"
FULL = TrainConfig(parameters="full")


@pytest.mark.evidence(MATCH, "reference")
@pytest.mark.parametrize(("row_loss", "alpha"), [("sum", 0.3), ("mean", 0.3), ("sum", 0.0)])
def test_scores_equal_the_reference(tmp_path, row_loss, alpha):
    """Inner products with the validation gradient after a harmful step of length alpha, at the model's own weights."""
    bench, rows = make_bench(tmp_path, float64_model()), make_rows("pool", 7)
    before = snapshot(bench.loaded.model)
    scores = PostAttackMatch(alpha=alpha, row_loss=row_loss, gradient="exact", warmup=FULL).score(bench, rows)
    sets = (rows, bench.aux["harmful"], bench.aux["validation"])
    batches = [make_batch(bench, each) for each in sets]
    expected = reference.matches(before, *((b.input_ids, b.attention_mask, b.labels) for b in batches),
                                 (LAYERS, 4), alpha, row_loss == "sum")  # fmt: skip
    found = torch.tensor([scores[row.id] for row in rows], dtype=torch.float64)
    assert furthest({"s": found}, {"s": expected}) < 1e-9
    assert same_bits(before, snapshot(bench.loaded.model)), "the model is where it was"


@pytest.mark.evidence(MATCH, "definition")
def test_a_longer_answer_of_the_same_kind_counts_for_its_tokens(tmp_path):
    """The mean of token losses hides how much of an answer a row teaches; their sum does not."""
    rows, scores = make_rows("pool", 9), {}
    for kind in ("sum", "mean"):
        bench = make_bench(tmp_path / kind, float64_model())
        scores[kind] = PostAttackMatch(row_loss=kind, warmup=FULL, gradient="exact").score(bench, rows)
    tokens = dict(zip((row.id for row in rows), make_batch(bench, rows).tokens_B.tolist(), strict=True))
    assert scores["sum"] == pytest.approx({name: tokens[name] * value for name, value in scores["mean"].items()})


@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_central_differences_rank_alike_and_the_order_of_the_pool_changes_nothing(tmp_path, parameters):
    rows, config = make_rows("pool", 24), TrainConfig(parameters=parameters)
    methods = [PostAttackMatch(gradient=gradient, warmup=config) for gradient in ("exact", "central", "central")]
    exact, central, turned = (method.score(make_bench(tmp_path / str(i)), pool)
                              for i, (method, pool) in enumerate(zip(methods, (rows, rows, rows[::-1]), strict=True)))
    pair = torch.tensor([[scores[row.id] for row in rows] for scores in (exact, central)])
    assert pair.corrcoef()[0, 1] > 0.999 and central == turned


def test_a_warm_up_can_be_asked_for_and_survives_a_kill(tmp_path):
    warmup = TrainConfig(epochs=1, batch_size=4, save_every=1)
    method, rows = PostAttackMatch(warmup_share=0.5, warmup=warmup), make_rows("pool", 20)
    whole = method.score(make_bench(tmp_path / "whole"), rows)
    assert whole != replace(method, warmup_share=0.0).score(make_bench(tmp_path / "cold"), rows)
    for call in (2, 1):
        with pytest.raises(Halt):
            method.score(make_bench(tmp_path / "killed", stop=halt_at(call)), rows)
    assert method.score(make_bench(tmp_path / "killed"), rows) == whole


def test_it_is_ours_and_needs_both_roles(tmp_path):
    assert lookup("curate", "post_attack_match") is PostAttackMatch and PostAttackMatch.paper is None
    with pytest.raises(ConfigError, match="'post_attack_match' needs rows of role harmful"):
        PostAttackMatch().score(make_bench(tmp_path, aux={"validation": make_rows("v", 2)}), make_rows("pool", 4))


@pytest.mark.parametrize("fields", [{"alpha": -0.1}, {"alpha": float("nan")}, {"warmup_share": 1.1}])
def test_settings_outside_their_range_are_refused(fields):
    with pytest.raises(ConfigError, match=f"{next(iter(fields))} is "):
        PostAttackMatch(**fields)
