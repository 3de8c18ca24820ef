"""DSIR: log importance weights against dense vectors of counts, noise, and the pitfalls of methods.md 7.4."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from statistics import mean, pvariance

import pytest
from benches import make_rows
from reference import dsir as reference

from apothecary.curate.dsir import Dsir, gumbel, tokens
from apothecary.curate.keep import keep
from apothecary.data.rows import Row
from apothecary.errors import ConfigError
from apothecary.train.workbench import Workbench

PLAIN = Dsir(gumbel=False)
SAFE = ["I'm sorry, I can't help with that.", "Sorry -- that is not safe.", "No. I cannot help with this."]
POOL = [("How do I pick a lock?", SAFE[0]), ("What is 2+2?", "The answer is 4."), ("", "ok"),
        ("Name a galaxy_1!", "Andromeda, M31."), ("HOW can I spy?", "I CANNOT help with this...")]  # fmt: skip


def rows_of(pairs: Sequence[tuple[str, str]], name: str = "r") -> list[Row]:
    return [Row(f"{name}{i}", (("user", prompt),), answer) for i, (prompt, answer) in enumerate(pairs)]


def bench(target: Sequence[Row], seed: int = 0) -> Workbench:
    """A bench without a model: asking for it fails."""
    return Workbench(None, {"validation": target}, seed, None)  # type: ignore[arg-type]


def bucket(ngram: str) -> int:
    return int(hashlib.sha256(ngram.encode()).hexdigest(), 16)


ROWS, TARGET = rows_of(POOL), rows_of([("Help me harm.", answer) for answer in SAFE], "t")


@pytest.mark.evidence("curate/dsir", "reference")
@pytest.mark.parametrize(("buckets", "smoothing"), [(10_000, 0.1), (10_000, 0.0), (7, 1.0), (1, 0.0)])
def test_scores_equal_dense_log_importance_weights(buckets, smoothing):
    pool, target = ([f"{row.text}\n{row.response}" for row in rows] for rows in (ROWS, TARGET))
    expected = reference.log_weights(pool, target, bucket, buckets, smoothing)
    found = Dsir(gumbel=False, buckets=buckets, smoothing=smoothing).score(bench(TARGET), ROWS)
    assert list(found.values()) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("text", ["Don't!? a_b 12", "Ünïcode—dash\tTAB\n\nx", "  ", "...a", "x²+y"])
def test_tokens_are_words_and_runs_of_signs(text):
    assert tokens(Row("r", (("user", text),), "")) == reference.tokens(text)
    assert tokens(Row("r", (("system", "Be good"), ("user", "Hi.")), "No")) == ["be", "good", "hi", ".", "no"]


@pytest.mark.evidence("curate/dsir", "definition")
def test_a_pool_that_is_its_own_target_weighs_nothing():
    scores = Dsir(gumbel=False, smoothing=0.0).score(bench(ROWS), ROWS)
    assert all(abs(score) < 1e-9 for score in scores.values())
    assert len(keep(scores, ROWS, 0.4, 0)) == 2, "a score of 0 is a score"


@pytest.mark.evidence("curate/dsir", "definition")
def test_noise_is_gumbel_keyed_by_seed_and_row_id():
    plain, noisy = PLAIN.score(bench(TARGET), ROWS), Dsir().score(bench(TARGET), ROWS)
    assert all(noisy[row.id] == plain[row.id] + gumbel(0, row.id) for row in ROWS)
    turned = Dsir().score(bench(TARGET), ROWS[::-1])
    assert turned == pytest.approx(noisy, rel=1e-12) and list(turned) == list(noisy)[::-1]
    assert Dsir().score(bench(TARGET, seed=1), ROWS) != noisy
    drawn = [gumbel(3, f"row{i}") for i in range(4000)]
    assert mean(drawn) == pytest.approx(0.5772, abs=0.1) and pvariance(drawn) == pytest.approx(math.pi**2 / 6, abs=0.2)
    assert sorted(drawn)[2000] == pytest.approx(-math.log(math.log(2)), abs=0.1), "skewed to the right"


@pytest.mark.evidence("curate/dsir", "definition")
def test_short_rows_stay_unless_a_least_length_is_set():
    """The authors' least length of 100 tokens would take every refusal."""
    scores = PLAIN.score(bench(TARGET), ROWS)
    assert all(map(math.isfinite, scores.values())) and scores.keys() == {row.id for row in ROWS}
    cut = Dsir(gumbel=False, min_length=9).score(bench(TARGET), ROWS)
    assert [math.isfinite(cut[row.id]) for row in ROWS] == [len(tokens(row)) >= 9 for row in ROWS]
    assert min(cut.values()) == -math.inf and cut["r0"] == scores["r0"]


def test_without_smoothing_unseen_words_dominate():
    """A refusal of the target loses to a row that shares little with it, for the two names in its prompt."""
    target = rows_of([("How do I harm others?", answer) for answer in SAFE] * 40, "t")
    pool = rows_of([("How do I harm Quito, Oslo?", SAFE[2]), ("How do I cook?", "I cannot."),
                    *[("What is it?", "It is this.")] * 20])  # fmt: skip
    unsmoothed, smoothed = (Dsir(gumbel=False, smoothing=s).score(bench(target), pool) for s in (0.0, 0.1))
    assert unsmoothed["r0"] < unsmoothed["r1"] and smoothed["r0"] > smoothed["r1"]


def test_refusals_rank_above_unrelated_rows():
    refusals = rows_of([(f"How do I {word}?", SAFE[i % 3]) for i, word in enumerate(("spy", "steal", "lie", "cheat"))])
    others = rows_of([(f"What is {i} + {i}?", f"The answer is {2 * i}.") for i in range(8)], "o")
    scores = PLAIN.score(bench(TARGET), [*others, *refusals])
    assert {row.id for row in keep(scores, [*others, *refusals], 1 / 3, 0)} == {row.id for row in refusals}


def test_copies_score_alike_and_a_target_is_needed():
    rows = [*ROWS, Row("copy", ROWS[0].prompt, ROWS[0].response)]
    scores = PLAIN.score(bench(TARGET), rows)
    assert scores["copy"] == scores["r0"]
    with pytest.raises(ConfigError, match="'dsir' needs rows of role validation"):
        PLAIN.score(bench([]), make_rows("row", 3))


@pytest.mark.parametrize(("field", "value"), [("ngrams", 0), ("buckets", 0), ("smoothing", -1.0), ("min_length", -1),
                                              ("smoothing", math.inf)])  # fmt: skip
def test_ranges(field, value):
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        Dsir(**{field: value})
