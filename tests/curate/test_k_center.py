"""k-center: the greedy order against brute force, its guarantee, ties and ids."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from benches import Halt, float64_model, halt_at, make_bench, make_rows, snapshot
from reference import embedding
from reference import k_center as reference
from tiny import LAYERS

from apothecary.curate.k_center import KCenter
from apothecary.curate.keep import keep
from apothecary.data.rows import Row
from apothecary.errors import ConfigError
from apothecary.train.config import TrainConfig
from apothecary.train.progress import watched

SHAPE = (LAYERS, 4)
ROWS = make_rows("pool", 9)


def points(n: int = 30, d: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)) * [1.0, 2.0, 0.5]


@pytest.mark.evidence("curate/k_center", "reference")
@pytest.mark.parametrize("seed", range(3))
def test_the_order_is_that_of_brute_force(seed):
    """Vectors of any length: where all have length 1, half the formula would not show."""
    cloud = points(seed=seed)
    assert KCenter().order(cloud, 0) == reference.order(cloud)
    assert KCenter().order(cloud.astype(np.float32), 0) == reference.order(cloud), "in single precision too"


@pytest.mark.evidence("curate/k_center", "reference")
@pytest.mark.parametrize(("tokens", "normalise"), [("all", True), ("prompt", False), ("response", True)])
def test_scores_are_the_places_in_the_order_of_the_embeddings(tmp_path, tokens, normalise):
    bench = make_bench(tmp_path, float64_model())
    weights = snapshot(bench.loaded.model)
    vectors = [embedding.vector(weights, row.ids, row.start, SHAPE, tokens, normalise)
               for row in bench.render(ROWS, TrainConfig())]  # fmt: skip
    found = KCenter(tokens=tokens, normalise=normalise, batch_size=4).score(bench, ROWS)
    order = sorted(found, key=found.__getitem__, reverse=True)
    assert order == [ROWS[i].id for i in reference.order(vectors)]
    assert [found[name] for name in order] == [-float(i) for i in range(9)]


@pytest.mark.evidence("curate/k_center", "definition")
def test_any_share_keeps_the_first_of_the_order(tmp_path):
    scores = KCenter().score(make_bench(tmp_path), ROWS)
    for count in range(1, 10):
        kept = keep(scores, ROWS, count / 9, seed=0)
        assert {row.id for row in kept} == set(sorted(scores, key=scores.__getitem__, reverse=True)[:count])


@pytest.mark.evidence("curate/k_center", "definition")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_radius_is_at_most_twice_the_best(count):
    for seed in range(3):
        cloud = points(10, seed=seed)
        greedy = reference.radius(cloud, KCenter().order(cloud, 0)[:count])
        assert greedy <= 2 * reference.best_radius(cloud, count) + 1e-12


@pytest.mark.evidence("curate/k_center", "definition")
def test_with_a_limit_the_rest_follows_by_its_distance(tmp_path):
    cloud = points()
    full, cut = KCenter().order(cloud, 0), KCenter(limit=5).order(cloud, 0)
    assert cut[:5] == full[:5] and sorted(cut) == list(range(30)) and cut[5] == full[5]
    far = [min(reference.distance(cloud[i], cloud[j]) for j in cut[:5]) for i in cut[5:]]
    assert far == sorted(far, reverse=True)
    with pytest.raises(Halt):
        KCenter().order(cloud, 0, partial(watched, make_bench(tmp_path, stop=halt_at(7))))


@pytest.mark.evidence("curate/k_center", "definition")
def test_rows_without_an_embedding_have_no_place():
    cloud = points()
    holed = np.insert(cloud, [0, 7, 30], np.nan, axis=0)
    real = np.flatnonzero(~np.isnan(holed[:, 0]))
    assert KCenter().order(holed, 0) == [real[i] for i in KCenter().order(cloud, 0)]
    assert sorted(KCenter(limit=3).order(holed, 0)) == real.tolist()
    assert KCenter().order(holed[:1], 0) == []


@pytest.mark.evidence("curate/k_center", "definition")
def test_rows_that_are_too_long_come_last(tmp_path):
    rows = [Row("a-long", (("user", "why " * 90),), "no"), *ROWS]
    scores = KCenter(over_long="drop").score(make_bench(tmp_path / "a"), rows)
    assert scores.pop("a-long") == -math.inf
    assert scores == KCenter().score(make_bench(tmp_path / "b"), ROWS)


def test_ties_go_to_the_smaller_id_and_copies_come_last(tmp_path):
    corners = np.array([[0.0, 0], [1, 1], [-1, 1], [1, -1], [-1, -1]])
    assert KCenter().order(corners, 0) == [0, 1, 2, 3, 4]
    copies = [Row(f"z{i}", ROWS[i].prompt, ROWS[i].response) for i in range(3)]
    rows = [*copies, *ROWS]
    scores = KCenter().score(make_bench(tmp_path), rows)
    assert {*sorted(scores, key=scores.__getitem__)[:3]} == {row.id for row in copies}


@pytest.mark.evidence("curate/k_center", "definition")
def test_a_random_start_follows_the_seed():
    cloud = points()
    starts = {seed: KCenter(start="random").order(cloud, seed) for seed in range(6)}
    assert len({order[0] for order in starts.values()}) > 2
    assert all(order == reference.order(cloud, first=order[0]) for order in starts.values())
    assert starts[0] == KCenter(start="random").order(cloud, 0)


@pytest.mark.parametrize(("field", "value"), [("limit", 0), ("batch_size", 0)])
def test_ranges(field, value):
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        KCenter(**{field: value})
