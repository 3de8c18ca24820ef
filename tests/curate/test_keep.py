"""From scores to a subset."""

from __future__ import annotations

import pytest
from benches import make_bench, make_rows

from apothecary.curate.keep import keep
from apothecary.data.rows import Row, read_rows, write_rows
from apothecary.errors import ConfigError, DataError
from apothecary.pipeline.stage import Job
from apothecary.pipeline.steps import chain
from apothecary.pipeline.steps.selection import curate
from apothecary.pipeline.store import Artifact

ROWS = make_rows("row", 10)


def test_the_best_are_kept_in_their_original_order():
    scores = {row.id: float(i * 7 % 10) for i, row in enumerate(ROWS)}
    kept = keep(scores, ROWS, 0.3, 0)
    assert sorted(scores[row.id] for row in kept) == [7, 8, 9]
    assert [ROWS.index(row) for row in kept] == sorted(ROWS.index(row) for row in kept)


@pytest.mark.parametrize(("share", "count"), [(1e-6, 1), (0.1, 1), (0.25, 2), (0.5, 5), (0.99, 10), (1.0, 10)])
def test_the_number_kept_is_the_rounded_share_and_at_least_one(share, count):
    assert len(keep({row.id: 0.0 for row in ROWS}, ROWS, share, 0)) == count


def test_ties_are_broken_by_the_seed_and_only_ties():
    scores = {row.id: float(i < 2) for i, row in enumerate(ROWS)}
    kept = [frozenset(row.id for row in keep(scores, ROWS, 0.5, seed)) for seed in range(20)]
    assert all({"row0", "row1"} <= ids for ids in kept)
    assert len(set(kept)) > 5 and set().union(*kept) == {row.id for row in ROWS}
    assert keep(scores, ROWS, 0.5, 3) == keep(scores, ROWS, 0.5, 3)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(ConfigError, match="expected a share in \\(0, 1\\]"):
        keep({row.id: 0.0 for row in ROWS}, ROWS, share, 0)


@pytest.mark.parametrize(
    ("scores", "message"),
    [({"row0": 1.0}, "'row1' has no score"), ({"row0": 1.0, "row1": float("nan")}, "'row1' has score NaN")],
)
def test_a_row_without_a_number_is_named(scores, message):
    with pytest.raises(DataError, match=message):
        keep(scores, ROWS[:2], 0.5, 0)


def test_a_score_of_zero_is_a_score_and_infinity_ranks_last():
    kept = keep({"row0": 0.0, "row1": -1.0, "row2": float("-inf")}, ROWS[:3], 0.67, 0)
    assert [row.id for row in kept] == ["row0", "row1"]


@pytest.mark.parametrize(("share", "count"), [(0.1, 1), (0.3, 3), (0.4, 3), (1.0, 3)])
def test_a_row_that_was_left_out_is_never_kept(caplog, share, count):
    scores = {row.id: float(i) if i in (2, 5, 7) else float("-inf") for i, row in enumerate(ROWS)}
    for seed in range(5):
        caplog.clear()
        kept = keep(scores, ROWS, share, seed)
        assert {row.id for row in kept} <= {"row2", "row5", "row7"} and len(kept) == count
        told = ["left out 7 of 10 rows, so that 3 are kept in place of"] if share > 0.3 else []
        assert len(caplog.messages) == len(told) and all(t in m for t, m in zip(told, caplog.messages, strict=True))


def test_a_pool_without_a_usable_row_is_refused():
    with pytest.raises(DataError, match="left out all 10 rows of the pool"):
        keep({row.id: float("-inf") for row in ROWS}, ROWS, 0.5, 0)


def test_the_stage_says_how_many_rows_were_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(chain, "bench", lambda job: make_bench(tmp_path))
    (tmp_path / "pool").mkdir()
    write_rows(tmp_path / "pool" / "rows.jsonl", [*ROWS, Row("long", (("user", "why " * 90),), "no")])
    settings = {"fields": {"over_long": "drop", "limit": 4}, "keep": 1.0, "seed": 0}
    job = Job({"kind": "curate", "method": "k_center", **settings}, {"rows": Artifact(tmp_path / "pool")}, tmp_path)
    found = curate(job)
    assert (found["rows"], found["pool"], found["dropped"]) == (10, 11, 1)
    assert "long" not in {row.id for row in read_rows(tmp_path / "rows.jsonl")}
