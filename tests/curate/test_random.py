"""The random selector."""

from __future__ import annotations

import pytest
from benches import make_rows

from apothecary.curate.keep import keep
from apothecary.curate.random import Random
from apothecary.registry import lookup
from apothecary.train.workbench import Workbench

ROWS = make_rows("row", 400)


def score(rows, seed):
    return Random().score(Workbench(None, {}, seed, None), rows)  # type: ignore[arg-type]


@pytest.mark.evidence("curate/random", "definition")
def test_a_permuted_pool_gives_the_same_subset():
    scores = score(ROWS, 0)
    assert score(ROWS[::-1], 0) == scores and score(ROWS[:5], 0) == {row.id: scores[row.id] for row in ROWS[:5]}
    kept, again = keep(scores, ROWS, 0.25, 0), keep(score(ROWS[::-1], 0), ROWS[::-1], 0.25, 0)
    assert {row.id for row in kept} == {row.id for row in again} and len(kept) == 100


@pytest.mark.evidence("curate/random", "definition")
def test_seeds_differ_and_scores_are_uniform():
    scores, others = score(ROWS, 0), score(ROWS, 1)
    assert len(set(scores.values())) == 400 and all(scores[key] != others[key] for key in scores)
    assert all(0 <= value < 1 for value in scores.values())
    assert 0.45 < sum(scores.values()) / 400 < 0.55
    both = sum(scores[key] > 0.5 and others[key] > 0.5 for key in scores)
    assert 70 < both < 130, "seeds choose independently"


def test_it_is_registered():
    assert lookup("curate", "random") is Random
