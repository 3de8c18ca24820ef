"""TaskVary: similarity with the customer's rows, against plain loops over the written-out GPT-2."""

from __future__ import annotations

import math

import numpy as np
import pytest
from benches import float64_model, make_bench, make_rows, snapshot
from reference import embedding
from reference import task_vary as reference
from tiny import LAYERS

from apothecary.curate import task_vary
from apothecary.curate.task_vary import TaskVary
from apothecary.data.rows import Row
from apothecary.errors import ConfigError, DataError
from apothecary.train.config import TrainConfig

SHAPE = (LAYERS, 4)
ROWS, USERS = make_rows("pool", 8), make_rows("customer", 5)
LONG = Row("long", (("user", "why " * 90),), "no")


@pytest.mark.evidence("curate/task_vary", "reference")
@pytest.mark.parametrize("over", ["mean", "max", "rank"])
@pytest.mark.parametrize(("direction", "tokens"), [("low", "last"), ("high", "last"), ("low", "all")])
def test_scores_equal_cosines_in_plain_loops(tmp_path, over, direction, tokens):
    bench = make_bench(tmp_path, float64_model(), aux={"customer": USERS})
    weights = snapshot(bench.loaded.model)
    pool, users = ([embedding.vector(weights, row.ids, row.start, SHAPE, tokens)
                    for row in bench.render(rows, TrainConfig())] for rows in (ROWS, USERS))  # fmt: skip
    expected = reference.scores(pool, users, over, similar=direction == "high")
    found = TaskVary(over=over, direction=direction, tokens=tokens, batch_size=3).score(bench, ROWS)
    assert [found[row.id] for row in ROWS] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.evidence("curate/task_vary", "definition")
@pytest.mark.parametrize(("over", "expected"), [("mean", [0.5, -0.5, 0.0, -0.5, -math.inf]),
                                                ("max", [0.0, -1.0, -1.0, -1.0, -math.inf]),
                                                ("rank", [0.0, -1.0, 0.0, -1.0, -math.inf])])  # fmt: skip
@pytest.mark.parametrize("chunk", [1, 2])
def test_closed_form_on_the_axes(monkeypatch, over, expected, chunk):
    """Customer rows along x and y; a row of the pool against each axis, and one without an embedding.

    Seen along y, the first and the fourth row are alike and share a place.
    """
    monkeypatch.setattr(task_vary, "CHUNK", chunk)
    pool = np.array([[-1.0, 0.0], [0.0, 1.0], [1.0, -1.0], [1.0, 0.0], [np.nan, np.nan]])
    users = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert TaskVary(over=over).unlikeness(pool, users).tolist() == expected


def test_the_customers_own_rows_are_left_out_first(tmp_path):
    bench = make_bench(tmp_path, aux={"customer": USERS[:1]})
    same = Row("same", USERS[0].prompt, USERS[0].response)
    for over in ("mean", "max"):
        scores = TaskVary(over=over).score(bench, [*ROWS, same])
        assert min(scores, key=scores.__getitem__) == "same" and scores["same"] == pytest.approx(-1, abs=1e-6)
    assert max(scores.values()) > -1 + 1e-3


@pytest.mark.evidence("curate/task_vary", "definition")
@pytest.mark.parametrize("direction", ["low", "high"])
def test_rows_that_are_too_long_come_last_and_customers_that_are_do_not_count(tmp_path, direction):
    bench = make_bench(tmp_path / "a", aux={"customer": [*USERS, LONG]})
    scores = TaskVary(over_long="drop", direction=direction).score(bench, [LONG, *ROWS])
    assert scores.pop("long") == -math.inf
    plain = make_bench(tmp_path / "b", aux={"customer": USERS})
    assert scores == pytest.approx(TaskVary(direction=direction).score(plain, ROWS), rel=1e-5)
    with pytest.raises(DataError, match="every customer row is longer"):
        TaskVary(over_long="drop").score(make_bench(tmp_path / "c", aux={"customer": [LONG]}), ROWS)


def test_the_customers_rows_are_needed(tmp_path):
    with pytest.raises(ConfigError, match="'task_vary' needs rows of role customer"):
        TaskVary().score(make_bench(tmp_path), ROWS)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        TaskVary(batch_size=0)
