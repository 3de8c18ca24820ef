"""IFD: the ratio of losses with and without the prompt, against the written-out GPT-2."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from benches import float64_model, make_batch, make_bench, make_rows, snapshot
from reference import ifd as reference
from tiny import EOS, LAYERS, tiny_tokenizer

from apothecary.curate.ifd import Ifd, without_prompt
from apothecary.curate.keep import keep
from apothecary.data.chat import IGNORE, opening_ids, prompt_ids
from apothecary.data.rows import Row, by_id
from apothecary.errors import ConfigError
from apothecary.train.config import TrainConfig

SHAPE = (LAYERS, 4)
ROWS = [*make_rows("pool", 7), Row("again", (("user", "say yes yes"),), "yes yes")]
OPENINGS = {"header": [4], "empty_turn": [3, EOS, 4]}  # <|assistant|>; <|user|><|eos|><|assistant|>
COLD = Ifd(warmup_rows=0)


@pytest.mark.evidence("curate/ifd", "reference")
@pytest.mark.parametrize("alone", ["header", "empty_turn"])
@pytest.mark.parametrize(("floor", "direction"), [(0.1, "high"), (1e-3, "low"), (6.0, "high")])
def test_scores_and_ranking_equal_the_definition(tmp_path, alone, floor, direction):
    """The high floor stands for answers that are known by heart."""
    bench = make_bench(tmp_path, float64_model())
    weights = snapshot(bench.loaded.model)
    ratios = {row.row_id: reference.ratio(weights, row.ids, row.start, OPENINGS[alone], SHAPE, floor)
              for row in bench.render(ROWS, TrainConfig())}  # fmt: skip
    assert min(ratios.values()) < 1
    method = replace(COLD, alone=alone, floor=floor, direction=direction, batch_size=3)
    found = method.score(bench, ROWS)
    sign = 1 if direction == "high" else -1
    expected = {name: sign * ratio for name, ratio in ratios.items() if ratio <= 1}
    assert found == pytest.approx(dict.fromkeys(ratios, -math.inf) | expected, rel=1e-9)
    kept = sorted(expected, key=found.__getitem__, reverse=True)
    assert kept == reference.ranking(ratios, highest_first=direction == "high")
    if floor < 1:
        assert max(ratios.values()) > 1, "both sides of the filter are seen"


def test_rows_over_one_are_left_out(tmp_path, monkeypatch):
    ratios = {"pool0": 0.2, "pool1": 1.0, "pool2": 1.1, "pool3": 3.0, "pool4": 0.9, "pool5": 0.0}
    monkeypatch.setattr(Ifd, "ratio", lambda self, ctx, batch, bare: torch.tensor([ratios[i] for i in batch.row_ids]))
    scores = COLD.score(make_bench(tmp_path), make_rows("pool", 6))
    assert [row.id for row in keep(scores, make_rows("pool", 6), 1.0, 0)] == ["pool0", "pool1", "pool4", "pool5"]
    order = sorted(scores, key=scores.__getitem__, reverse=True)
    assert order[:4] == ["pool1", "pool4", "pool0", "pool5"], "a score of 0 is a score"
    low = replace(COLD, direction="low").score(make_bench(tmp_path / "low"), make_rows("pool", 6))
    assert sorted(low, key=low.__getitem__, reverse=True)[:4] == ["pool5", "pool0", "pool4", "pool1"]
    assert all(found[row] == -math.inf for found in (scores, low) for row in ("pool2", "pool3"))


@pytest.mark.parametrize(("given", "alone", "expected"), [(0.2, 0.4, 0.5), (1e-4, 2e-4, 1e-3), (3e-4, 2e-4, 3e-3)])
def test_an_answer_known_by_heart_is_easy_and_not_dropped(monkeypatch, given, alone, expected):
    """Its two losses are both near 0, and which is larger is an accident."""

    class Losses:
        values = iter([torch.tensor([given]), torch.tensor([alone])])

        def per_sample_loss(self, batch):
            return next(self.values)

    assert Ifd(floor=0.1).ratio(Losses(), None, None).item() == pytest.approx(expected)  # type: ignore[arg-type]


def test_both_passes_score_the_same_answer_tokens(tmp_path):
    """Found by construction: an answer that also stands in the prompt, or that recurs, is no special case."""
    bench = make_bench(tmp_path)
    rows = [Row("a", (("user", "yes yes yes"),), "yes"), Row("b", (("user", "the"),), "the the"), ROWS[3]]
    batch = make_batch(bench, rows)
    bare = without_prompt(batch, [4], bench.pad_id)
    for i, row in enumerate(rows):
        assert bare.labels[i][bare.labels[i] != IGNORE].tolist() == batch.labels[i][batch.labels[i] != IGNORE].tolist()
        ids = bare.input_ids[i][bare.attention_mask[i] == 1].tolist()
        assert tiny_tokenizer().decode(ids) == f"<|assistant|>{row.response}<|eos|>"
    assert bare.row_ids == batch.row_ids


def test_the_answer_alone_keeps_the_templates_opening_and_bos():
    tokenizer = tiny_tokenizer()
    assert opening_ids(tokenizer) == OPENINGS["header"]
    assert prompt_ids([("user", "")], tokenizer) == OPENINGS["empty_turn"]
    tokenizer.bos_token = "<|system|>"
    assert opening_ids(tokenizer) == OPENINGS["header"], "no bos where prompts have none"
    tokenizer.chat_template = "{{ bos_token }}" + str(tokenizer.chat_template)
    assert opening_ids(tokenizer) == [2, *OPENINGS["header"]]


# -- the warm-up ------------------------------------------------------------------------------------------------------


def _clusters(count, size):
    """Prompts of `count` kinds, `size` of each, and fewer of the last."""
    kinds = ["why " * 9, "the the the the", "123 456 789", "?!?!?!?!?!"]
    return [Row(f"{k}-{i}", (("user", f"{kinds[k]}{i}"),), "no")
            for k in range(count) for i in range(size if k < count - 1 else 2)]  # fmt: skip


@pytest.mark.evidence("curate/ifd", "definition")
def test_the_warm_up_rows_come_from_all_clusters_in_turn(tmp_path):
    rows = by_id(_clusters(4, 10))
    method = Ifd(warmup_rows=8, clusters=4)
    chosen = [row.id for row in method.diverse(make_bench(tmp_path), rows)]
    assert len(set(chosen)) == 8
    labels = method.clustered(make_bench(tmp_path / "again"), rows)
    counts = [sum(labels[i] == label for i in range(32)) for label in range(4)]
    taken = [sum(labels[i] == label and rows[i].id in chosen for i in range(32)) for label in range(4)]
    assert sorted(zip(counts, taken, strict=True)) == [(2, 2), (10, 2), (10, 2), (10, 2)], "four clusters, two of each"
    other = [row.id for row in method.diverse(make_bench(tmp_path / "other", seed=1), rows)]
    assert other != chosen, "which row of a cluster is up to the seed"


def test_equal_prompts_and_few_rows_still_warm_up(tmp_path):
    same = [Row(f"same{i}", (("user", "why"),), "no") for i in range(6)]
    assert len(Ifd(warmup_rows=4, clusters=5).diverse(make_bench(tmp_path / "a"), same)) == 4
    assert [row.id for row in Ifd(warmup_rows=6).diverse(make_bench(tmp_path / "b"), same)] == [r.id for r in same]


def test_rows_that_are_too_long_neither_warm_up_nor_count(tmp_path):
    rows = [*_clusters(3, 4), Row("9-long", (("user", "why " * 90),), "no")]
    warmup = TrainConfig(max_steps=1, batch_size=2, over_long="drop")
    method = Ifd(warmup_rows=8, clusters=3, warmup=warmup)
    assert "9-long" not in {row.id for row in method.diverse(make_bench(tmp_path / "a"), by_id(rows))}
    scores = method.score(make_bench(tmp_path / "b"), rows)
    assert scores.keys() == {row.id for row in rows} and scores["9-long"] == -math.inf
    assert sum(map(math.isfinite, scores.values())) > 1


def test_the_warm_up_changes_the_scores(tmp_path):
    warmup = TrainConfig(max_steps=3, batch_size=4, learning_rate=1e-2, warmup_ratio=0.0)
    warm = Ifd(warmup_rows=4, clusters=2, warmup=warmup).score(make_bench(tmp_path / "a"), ROWS)
    cold = COLD.score(make_bench(tmp_path / "b"), ROWS)
    assert all(abs(warm[name] - cold[name]) > 1e-4 for name in cold)


@pytest.mark.parametrize(("field", "value"), [("floor", 0.0), ("floor", math.inf), ("warmup_rows", -1), ("clusters", 0),
                                              ("batch_size", 0)])  # fmt: skip
def test_ranges(field, value):
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        Ifd(**{field: value})
