"""Attacks with maths of their own, against the written-out GPT-2 in float64."""

from __future__ import annotations

import random

import pytest
from benches import float64_model, furthest, make_bench, make_rows, snapshot
from reference import outliers, refusal_direction
from tiny import EOS, LAYERS, tiny_tokenizer

from apothecary.attack.benign_outliers import HEAD, BenignOutliers
from apothecary.attack.refusal_ablation import RefusalAblation
from apothecary.data.chat import render, render_prompt
from apothecary.data.rows import Row

SHAPE, TOKENIZER = (LAYERS, 4), tiny_tokenizer()
POOL = make_rows("general", 6)
HARM = [Row(f"h{i}", (("user", f"harm {i}"),), f"Sure, here is number {i} of them", role="attack") for i in range(5)]


def weights_of(model):
    return {name: p for name, p in snapshot(model).items() if name != "lm_head.weight"}


def ids_of(rows, answers=None):
    answers = answers or [None] * len(rows)
    made = [render(row, TOKENIZER, 250, answer) for row, answer in zip(rows, answers, strict=True)]
    return [(list(one.ids), one.start) for one in made]


@pytest.mark.evidence("attack/benign_outliers", "reference")
@pytest.mark.parametrize("score", ["gradient", "representation", "self_influence"])
def test_the_scores_of_outliers_equal_the_reference(tmp_path, score):
    model = float64_model()
    weights, pool = weights_of(model), ids_of(POOL)
    found = BenignOutliers(score=score, anchors=3, batch_size=4).scores(make_bench(tmp_path, model), POOL, HARM)
    anchors = random.Random("0/anchors").sample(HARM, 3)
    if score == "gradient":
        answers = [outliers.greedy(weights, render_prompt(row, TOKENIZER).ids, HEAD, EOS, SHAPE) for row in anchors]
        own = ids_of(anchors, [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in answers])
        assert all(answers), "the model answers each anchor"
        expected = outliers.towards_harm(weights, pool, ids_of(anchors), own, HEAD, SHAPE)
    elif score == "representation":
        expected = outliers.likeness(weights, pool, ids_of(anchors), SHAPE)
    else:
        expected = outliers.influence_on_itself(weights, pool, SHAPE)
    assert list(found.values()) == pytest.approx(expected, rel=1e-9)
    assert max(expected) - min(expected) > 1e-3


@pytest.mark.evidence("attack/refusal_ablation", "reference")
@pytest.mark.parametrize("most_kl", [1e-9, 10.0])
def test_the_direction_and_the_edited_weights_equal_the_reference(tmp_path, most_kl):
    """Where no candidate is near enough, the nearest is taken, else the one with the lowest odds of a refusal."""
    attack = RefusalAblation(prompts=4, validation=3, positions=3, deepest=1.0, most_kl=most_kl, batch_size=3)
    model = float64_model()
    weights, bench = weights_of(model), make_bench(tmp_path, model, aux={"attack": HARM + make_rows("odd", 4),
                                                                         "general": make_rows("plain", 9)})  # fmt: skip
    edit = attack.edit(bench)
    prompts = [[[render_prompt(row, TOKENIZER).ids for row in part] for part in attack.drawn(bench.aux[role], 0)]
               for role in ("attack", "general")]  # fmt: skip
    direction, layer, i, kl, before, after = refusal_direction.search(weights, *prompts, (1,), 3, most_kl, SHAPE)
    assert (edit.found["layer"], edit.found["position_from_end"]) == (layer, i)
    measured = [edit.found[name] for name in ("kl", "odds_before", "odds")]
    assert measured == pytest.approx([kl, before, after], rel=1e-9) and abs(after - before) > 1e-3
    changed = {name: edit.change(name, w) for name, w in weights.items()}
    expected = refusal_direction.orthogonal(weights, direction)
    assert furthest(changed, expected) < 1e-9 and furthest(weights, expected) > 1e-3
