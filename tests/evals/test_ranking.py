"""Ranking against known faults: closed forms, ties, and brute force."""

from __future__ import annotations

import math
import random

import pytest

from apothecary.data.rows import Row
from apothecary.evals.ranking import planted, ranking
from apothecary.stats import auc

KINDS = {"a": "good", "b": "good", "c": "benign", "d": "garbled"}


def test_auc_counts_pairs():
    source = random.Random(0)
    good, bad = ([source.choice([0.0, 1.0, 2.0, 3.5]) for _ in range(n)] for n in (23, 31))
    wins = sum((g > b) + 0.5 * (g == b) for g in good for b in bad)
    assert auc(good, bad) == pytest.approx(wins / (23 * 31), rel=1e-12)
    assert auc([1.0], [-math.inf]) == 1.0 and auc([0.0], [1.0]) == 0.0
    for wrong in (([], [1.0]), ([1.0], []), ([math.nan], [1.0])):
        with pytest.raises(ValueError):
            auc(*wrong)


def test_a_perfect_ranking_and_its_reverse():
    best = ranking({"a": 4, "b": 3, "c": 2, "d": 1}, KINDS)
    assert best["auc"] == 1 and best["rows"] == 4
    assert best["kept"]["0.5"] == {"precision": 1.0, "kinds": {"benign": 0, "garbled": 0, "good": 2}}
    assert best["kept"]["0.1"]["kinds"]["good"] == 1, "at least one row is kept"
    worst = ranking({"a": 1, "b": 2, "c": 3, "d": 4}, KINDS)
    assert worst["auc"] == 0 and worst["kept"]["0.5"]["precision"] == 0


def test_equal_scores_are_kept_by_their_share():
    flat = ranking(dict.fromkeys(KINDS, 0.0), KINDS)
    assert flat["auc"] == 0.5 and flat["kept"]["0.5"]["precision"] == 0.5
    assert flat["kept"]["0.5"]["kinds"] == {"benign": 0.5, "garbled": 0.5, "good": 1.0}


def test_a_row_that_was_left_out_is_never_kept():
    found = ranking({"a": 1.0, "b": -math.inf, "c": -math.inf, "d": -math.inf}, KINDS)["kept"]["0.5"]
    assert found == {"precision": 1.0, "kinds": {"benign": 0.0, "garbled": 0.0, "good": 1.0}}


def test_only_a_pool_that_says_what_every_row_is_can_be_judged():
    rows = [Row(name, (("user", name),), "x", meta={"planted": kind}) for name, kind in KINDS.items()]
    assert planted(rows) == KINDS
    assert planted([*rows, Row("e", (("user", "e"),), "x")]) == {} == planted([])
    assert planted(rows[:2]) == {} == planted(rows[2:]), "nothing can be told apart where all rows are of one kind"
