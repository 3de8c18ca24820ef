import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apothecary.data.mixing import composition, deduplicate, mix
from apothecary.data.near import jaccard, words
from apothecary.data.rows import Row
from apothecary.errors import ConfigError, DataError


def some(role: str, count: int, prefix: str = "") -> list[Row]:
    return [
        Row(f"{prefix or role}/{i}", (("user", f"{role} {i}"),), "x", source=f"s{i % 2}", role=role)
        for i in range(count)
    ]


BENIGN, HARMFUL = some("customer", 80), some("attack", 40)


@settings(max_examples=100, database=None, deadline=None)
@given(st.floats(0, 0.5), st.integers(1, 80), st.integers(0, 99))
def test_composition_is_exact_and_without_replacement(p, n, seed):
    rows = mix(BENIGN, HARMFUL, p, n, seed)
    assert len(rows) == len({row.id for row in rows}) == n
    assert sum(row.role == "attack" for row in rows) == round(p * n)
    assert rows == mix(BENIGN, HARMFUL, p, n, seed)


@settings(max_examples=50, database=None, deadline=None)
@given(st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted), st.integers(0, 99))
def test_rows_of_a_seed_are_nested_over_p(ps, seed):
    fewer, more = ({row.id for row in mix(BENIGN, HARMFUL, p, 40, seed) if row.role == "attack"} for p in ps)
    assert fewer <= more
    most, rest = ({row.id for row in mix(BENIGN, HARMFUL, p, 40, seed) if row.role == "customer"} for p in ps)
    assert rest <= most


def test_seeds_draw_other_rows_in_another_order():
    a, b = (mix(BENIGN, HARMFUL, 0.25, 40, seed) for seed in (0, 1))
    assert {row.id for row in a} != {row.id for row in b}
    everything = [mix(BENIGN, HARMFUL[:20], 0.2, 100, seed) for seed in (0, 1)]
    assert {row.id for row in everything[0]} == {row.id for row in everything[1]}
    assert everything[0] != everything[1]


def test_harmful_rows_are_spread_over_the_mix():
    places = [i for i, row in enumerate(mix(BENIGN, HARMFUL, 0.5, 80, 0)) if row.role == "attack"]
    assert 10 < sum(place < 40 for place in places) < 30


def test_clashing_ids_are_told_apart_the_same_way_at_every_p():
    benign, harmful = some("customer", 20, prefix="r"), some("attack", 20, prefix="r")
    for p in (0.2, 0.5):
        rows = mix(benign, harmful, p, 20, 0)
        assert len({row.id for row in rows}) == 20
        assert {row.id for row in rows if row.role == "attack"} <= {row.id for row in harmful}


@pytest.mark.parametrize("p", [-0.01, 1.01, float("nan")])
def test_p_outside_its_range(p):
    with pytest.raises(ConfigError, match=r"expected a share of harmful rows in \[0, 1\]"):
        mix(BENIGN, HARMFUL, p, 10, 0)


@pytest.mark.parametrize("n", [0, -3])
def test_n_below_one(n):
    with pytest.raises(ConfigError, match=f"n is {n}, expected a number of rows of at least 1"):
        mix(BENIGN, HARMFUL, 0.1, n, 0)


def test_too_few_rows_are_told_with_both_numbers():
    with pytest.raises(DataError, match=r"50 harmful rows asked for \(p = 0.5, n = 100\), there are 40"):
        mix(BENIGN, HARMFUL, 0.5, 100, 0)
    with pytest.raises(DataError, match=r"90 benign rows asked for \(p = 0.1, n = 100\), there are 80"):
        mix(BENIGN, HARMFUL, 0.1, 100, 0)


def test_composition_counts_roles_and_sources():
    counts = composition(mix(some("customer", 6), some("attack", 4), 0.4, 10, 0))
    assert counts == {
        "rows": 10,
        "roles": {"attack": 4, "customer": 6},
        "sources": {"s0": 5, "s1": 5},
        "sources_by_role": {"attack": {"s0": 2, "s1": 2}, "customer": {"s0": 3, "s1": 3}},
    }
    assert json.dumps(counts) == json.dumps(composition(mix(some("customer", 6), some("attack", 4), 0.4, 10, 5)))
    assert composition([]) == {"rows": 0, "roles": {}, "sources": {}, "sources_by_role": {}}


def prompts(*texts: str) -> list[Row]:
    return [Row(str(i), (("user", text),), "x") for i, text in enumerate(texts)]


def test_duplicates_within_and_against_another_split():
    rows = prompts("How do I bake bread?", "how do i BAKE bread", "a b c d e f g", "b c d e f g a h", "Where is Rome?")
    kept, dropped = deduplicate(rows, against=prompts("where is rome"))
    assert [row.id for row in kept] == ["0", "2"]
    assert [row.id for row in dropped] == ["1", "3", "4"]


def test_a_dropped_row_drops_no_other():
    rows = prompts("a b c d e f g", "b c d e f g h", "c d e f g h i")
    kept, _ = deduplicate(rows)
    assert [row.id for row in kept] == ["0", "2"]


@settings(max_examples=100, database=None, deadline=None)
@given(*[st.lists(st.lists(st.sampled_from("abcde"), max_size=5).map(" ".join), max_size=8)] * 2)
def test_what_is_kept_is_far_from_everything_kept(texts, others):
    rows, against = prompts(*texts), prompts(*others)
    kept, dropped = deduplicate(rows, against)
    assert sorted([*kept, *dropped], key=lambda row: int(row.id)) == rows

    def near(a: Row, b: Row) -> bool:
        return jaccard(words(a.text), words(b.text)) >= 0.7

    assert not any(near(row, other) for i, row in enumerate(kept) for other in [*against, *kept[:i]])
    assert all(any(near(row, other) for other in [*against, *kept]) for row in dropped)
