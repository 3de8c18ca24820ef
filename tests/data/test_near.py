from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apothecary.data.near import clusters, jaccard, near_pairs, words

TEXTS = st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=8).map(" ".join), max_size=14)
THRESHOLDS = st.sampled_from([0.1, 0.3, 0.5, 0.55, 0.6, 0.7, 0.9, 1.0])


def brute(texts: list[str], threshold: float) -> set[tuple[int, int]]:
    sets = [words(text) for text in texts]
    return {(i, j) for i, j in combinations(range(len(texts)), 2) if jaccard(sets[i], sets[j]) >= threshold}


@settings(max_examples=300, database=None, deadline=None)
@given(TEXTS, THRESHOLDS)
def test_near_pairs_equal_brute_force(texts, threshold):
    found = list(near_pairs(texts, threshold))
    assert len(found) == len(set(found))
    assert set(found) == brute(texts, threshold)


@settings(max_examples=100, database=None, deadline=None)
@given(TEXTS, THRESHOLDS)
def test_clusters_are_connected_components(texts, threshold):
    label = list(range(len(texts)))
    for _ in texts:
        for i, j in brute(texts, threshold):
            label[i] = label[j] = min(label[i], label[j])
    assert clusters(texts, threshold) == label


@pytest.mark.parametrize(("shared", "total", "threshold"), [(7, 10, 0.7), (11, 20, 0.55), (3, 5, 0.6), (1, 1, 1.0)])
def test_similarity_of_exactly_the_threshold_is_near(shared, total, threshold):
    a = " ".join(f"w{i}" for i in range(total))
    b = " ".join(f"w{i}" for i in range(shared))
    assert list(near_pairs([a, b], threshold)) == [(0, 1)]
    assert list(near_pairs([b, a], threshold)) == [(0, 1)]


def test_case_punctuation_and_compatibility_forms_are_ignored():
    assert words("How do I... PICK a lock?") == words("how do i pick\na LOCK")
    assert words("\uff28ow \ufb01ne") == words("how fine")  # full-width letter, ligature
    assert words("snake_case") == {"snake", "case"}


def test_texts_without_words_are_equal_to_each_other_only():
    assert set(near_pairs(["!!!", "hello", "???"])) == {(0, 2)}


def test_clusters_join_through_a_chain():
    chain = ["a b c d e f g", "b c d e f g h", "c d e f g h i", "x y z"]
    assert jaccard(words(chain[0]), words(chain[2])) < 0.7
    assert clusters(chain) == [0, 0, 0, 3]


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.01])
def test_threshold_outside_its_range(threshold):
    with pytest.raises(ValueError, match="expected a similarity"):
        list(near_pairs(["a"], threshold))
