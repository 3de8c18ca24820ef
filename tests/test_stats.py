import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats as scipy_stats

from apothecary.stats import (
    Mean,
    auc,
    auc_difference,
    auc_interval,
    clustered_interval,
    clustered_mcnemar,
    cohen_kappa,
    crossed_mean,
    detectable_difference,
    fewest_discordant,
    holm,
    mcnemar,
    mean_interval,
    newcombe,
    paired_bootstrap,
    paired_share_interval,
    rank_correlation,
    share_interval,
    wilson,
)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 259), (259, 259), (7, 20), (130, 259), (1, 100_000)])
def test_wilson_equals_scipy(k: int, n: int, level: float) -> None:
    expected = scipy_stats.binomtest(k, n).proportion_ci(confidence_level=level, method="wilson")
    assert wilson(k, n, level) == pytest.approx((expected.low, expected.high), abs=1e-10)


def test_wilson_touches_the_ends_exactly() -> None:
    assert wilson(0, 12).low == 0.0
    assert wilson(12, 12).high == 1.0


@pytest.mark.parametrize(("k", "n", "level"), [(0, 0, 0.95), (3, 2, 0.95), (-1, 5, 0.95), (1, 5, 95)])
def test_wilson_rejects_impossible_counts(k: int, n: int, level: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        wilson(k, n, level)


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize("values", [[0.1, 0.4], [0.71, 0.73, 0.9], [5.0, 5.0, 5.0], list(np.linspace(-3, 8, 40))])
def test_mean_interval_equals_scipy(values: list[float], level: float) -> None:
    error = scipy_stats.sem(values)
    mean = float(np.mean(values))
    expected = scipy_stats.t.interval(level, len(values) - 1, mean, error) if error else (mean, mean)
    assert mean_interval(values, level) == pytest.approx(expected, abs=1e-10)


def test_one_seed_has_no_interval_and_none_is_an_error() -> None:
    assert all(map(math.isnan, mean_interval([0.5])))
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


@pytest.mark.parametrize(("only_a", "only_b", "both"), [(0, 0, 5), (1, 0, 3), (3, 3, 0), (2, 9, 30), (40, 11, 200)])
def test_mcnemar_equals_the_exact_binomial_test(only_a: int, only_b: int, both: int) -> None:
    a = [1] * only_a + [0] * only_b + [1] * both
    b = [0] * only_a + [1] * only_b + [1] * both
    n = only_a + only_b
    expected = scipy_stats.binomtest(only_a, n).pvalue if n else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, abs=1e-10)
    assert mcnemar(a, b) == mcnemar(b, a)


def test_mcnemar_wants_pairs_of_outcomes() -> None:
    with pytest.raises(ValueError, match="same prompts"):
        mcnemar([1], [1, 0])
    with pytest.raises(ValueError, match="0 and 1"):
        mcnemar([2], [1])


def test_bootstrap_agrees_with_scipy_and_with_its_seed() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.6, 1, 80), rng.normal(0.0, 1, 80)
    got = paired_bootstrap(a, b, resamples=4000, seed=3)
    reference = scipy_stats.bootstrap(
        (a - b,), np.mean, n_resamples=4000, method="percentile", random_state=9
    ).confidence_interval
    assert got == pytest.approx((reference.low, reference.high), abs=0.03)
    assert got == paired_bootstrap(a, b, resamples=4000, seed=3)
    assert got != paired_bootstrap(a, b, resamples=4000, seed=4)


def test_bootstrap_uses_the_pairing() -> None:
    noise = np.random.default_rng(0).normal(0, 10, 50)
    assert paired_bootstrap(noise + 1, noise, resamples=200) == pytest.approx((1.0, 1.0))
    assert paired_bootstrap([1, 1, 0, 1], [1, 1, 0, 1], resamples=200) == (0.0, 0.0)


def test_bootstrap_of_the_swapped_arms_is_mirrored() -> None:
    a, b = [1, 0, 1, 1, 0, 1, 1, 0], [0, 0, 1, 0, 0, 1, 0, 1]
    low, high = paired_bootstrap(a, b, resamples=500)
    assert paired_bootstrap(b, a, resamples=500) == pytest.approx((-high, -low))
    assert low < high


def test_importing_stats_imports_neither_torch_nor_scipy() -> None:
    code = "import sys, apothecary.stats; assert not {'torch', 'scipy', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_share_over_seeds_takes_the_wider_end_on_either_side() -> None:
    assert share_interval([0.84], 100) == wilson(84, 100)
    assert share_interval([0.84] * 3, 100) == wilson(84, 100), "equal seeds do not make the prompts certain"
    low, high = mean_interval([0.6, 0.8, 0.95])
    assert share_interval([0.6, 0.8, 0.95], 100) == (low, min(1.0, high))
    near = share_interval([0.98, 1.0], 50)
    assert near.low == min(wilson(50, 50).low, mean_interval([0.98, 1.0]).low) and near.high == 1.0
    with pytest.raises(ValueError, match="one for each seed"):
        share_interval([], 10)


def test_rank_correlation_is_spearmans_over_the_same_ids() -> None:
    a = {"x": 1.0, "y": 2.0, "z": 3.0, "u": -math.inf}
    assert rank_correlation(a, {"u": 0.0, "z": 9.0, "y": 5.0, "x": 4.0}) == pytest.approx(1.0)
    assert rank_correlation(a, {name: -score for name, score in a.items()}) == pytest.approx(-1.0)
    ties = {"x": 1.0, "y": 1.0, "z": 2.0, "u": 2.0}
    ranks_a, ranks_b = [2, 3, 4, 1], [1.5, 1.5, 3.5, 3.5]
    assert rank_correlation(a, ties) == pytest.approx(float(np.corrcoef(ranks_a, ranks_b)[0, 1]))
    assert math.isnan(rank_correlation(a, dict.fromkeys(a, 0.0)))
    for other in ({"x": 1.0}, {**a, "u": math.nan}):
        with pytest.raises(ValueError, match=r"same rows|nan"):
            rank_correlation(a, other)


@pytest.mark.parametrize("p_values", [[0.01, 0.04, 0.03, 0.005], [0.5], [0.2, 0.2, 0.9, 0.0, 1.0], [0.04] * 3])
def test_holm_equals_statsmodels(p_values: list[float]) -> None:
    from statsmodels.stats.multitest import multipletests

    assert holm(p_values) == pytest.approx(list(multipletests(p_values, method="holm")[1]), abs=1e-10)
    assert holm([]) == []
    with pytest.raises(ValueError, match="outside"):
        holm([1.2])


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_clustered_interval_equals_cluster_robust_regression(level: float) -> None:
    import statsmodels.api as sm

    rng = np.random.default_rng(0)
    clusters = [list(rng.normal(rng.normal(), 0.3, size=1 + i % 4)) for i in range(23)]
    groups = np.repeat(np.arange(23), [len(cluster) for cluster in clusters])
    values = np.concatenate(clusters)
    fitted = sm.OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    assert clustered_interval(clusters, level) == pytest.approx(fitted.conf_int(1 - level)[0], abs=1e-10)


def test_answers_of_several_seeds_to_one_prompt_are_no_independent_evidence() -> None:
    """Three seeds that agree on every prompt say no more than one."""
    labels = [0.0] * 20 + [1.0] * 10
    once, thrice = clustered_interval([[x] for x in labels]), clustered_interval([[x] * 3 for x in labels])
    assert thrice == pytest.approx(once) and once == pytest.approx(mean_interval(labels))
    assert all(map(math.isnan, clustered_interval([[0.1, 0.2]])))
    for wrong in ([], [[1.0], []]):
        with pytest.raises(ValueError, match="expected at least one value"):
            clustered_interval(wrong)


@pytest.mark.parametrize(("n", "power"), [(300, 0.8), (3, 0.8), (12, 0.95)])
def test_the_detectable_difference_equals_statsmodels(n: int, power: float) -> None:
    from statsmodels.stats.power import TTestPower

    values = list(np.random.default_rng(n).normal(2.0, 0.7, n))
    found = detectable_difference(values, power=power)
    effect = found / float(np.std(values, ddof=1))
    assert TTestPower().power(effect, n, 0.05) == pytest.approx(power, abs=1e-10)
    assert detectable_difference([x + 5 for x in values], power=power) == pytest.approx(found), "only the spread counts"


def test_without_spread_nothing_is_known_of_what_can_be_seen() -> None:
    assert math.isnan(detectable_difference([0.3])) and math.isnan(detectable_difference([0.3] * 9))
    with pytest.raises(ValueError, match=r"power is 0\.01"):
        detectable_difference([0.0, 1.0], power=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_kappa_equals_statsmodels(seed: int) -> None:
    from statsmodels.stats.inter_rater import cohens_kappa

    rng = np.random.default_rng(seed)
    a = rng.integers(3, size=60)
    b = np.where(rng.random(60) < 0.6, a, rng.integers(3, size=60))
    table = np.zeros((3, 3))
    np.add.at(table, (a, b), 1)
    expected = cohens_kappa(table)
    kappa, interval = cohen_kappa(a.tolist(), b.tolist())
    assert kappa == pytest.approx(expected.kappa, abs=1e-10)
    assert interval == pytest.approx((expected.kappa_low, expected.kappa_upp), abs=1e-10)


def test_kappa_of_judges_that_agree_throughout() -> None:
    assert cohen_kappa("aab", "aab")[0] == 1.0
    assert math.isnan(cohen_kappa("aaa", "aaa")[0]), "there is nothing beyond chance to agree on"
    with pytest.raises(ValueError, match="same items"):
        cohen_kappa("a", "ab")


def effects(rng: np.random.Generator, n: int, seeds: int, prompt: float, seed: float, rest: float) -> np.ndarray:
    """n x seeds values of mean zero, with a part for each prompt, one for each seed, and one for each cell."""
    return prompt * rng.normal(size=(n, 1)) + seed * rng.normal(size=seeds) + rest * rng.normal(size=(n, seeds))


@pytest.mark.parametrize(("prompt", "seed"), [(1.0, 1.0), (1.0, 0.05), (0.0, 2.0)])
def test_the_crossed_mean_has_the_mean_squares_of_statsmodels(prompt: float, seed: float) -> None:
    import pandas as pd
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    n, seeds = 14, 4
    values = effects(np.random.default_rng(4), n, seeds, prompt, seed, 0.5) + 0.3
    frame = pd.DataFrame([(i, j, values[i, j]) for i in range(n) for j in range(seeds)], columns=["p", "s", "x"])
    found = anova_lm(ols("x ~ C(p) + C(s)", frame).fit())["mean_sq"]
    by_prompt, by_seed, rest = found["C(p)"], found["C(s)"], found["Residual"]
    luck = max(0.0, by_seed - rest)
    freedom = (by_prompt + luck) ** 2 / (by_prompt**2 / (n - 1) + (luck > 0) * (
        by_seed**2 / (seeds - 1) + rest**2 / ((n - 1) * (seeds - 1))))  # fmt: skip
    got = crossed_mean(values.tolist())
    assert got == pytest.approx((values.mean(), math.sqrt((by_prompt + luck) / values.size), freedom), abs=1e-10)
    half = scipy_stats.t.ppf(0.95, freedom) * got.error
    assert got.interval(0.9) == pytest.approx((got.value - half, got.value + half), abs=1e-10)
    assert got.p_value() == pytest.approx(2 * scipy_stats.t.sf(abs(got.value) / got.error, freedom), abs=1e-10)


def test_one_seed_gives_the_paired_t_test() -> None:
    values = np.random.default_rng(2).normal(0.2, 1, 40)
    got, expected = crossed_mean([[x] for x in values]), scipy_stats.ttest_1samp(values, 0)
    assert got.p_value() == pytest.approx(expected.pvalue, abs=1e-10)
    interval = expected.confidence_interval(0.95)
    assert got.interval() == pytest.approx((interval.low, interval.high), abs=1e-10)
    assert got.detectable() == pytest.approx(detectable_difference(values.tolist()), abs=1e-10)


def test_seeds_that_agree_are_no_further_evidence_and_seeds_that_differ_are_heard() -> None:
    labels = [0.0] * 20 + [1.0] * 10
    assert crossed_mean([[x] * 3 for x in labels]) == pytest.approx(crossed_mean([[x] for x in labels]))
    apart = crossed_mean([[x, x + 1, x + 2] for x in labels])
    assert apart.error > 0.5 and apart.freedom < 2.1, "the spread of three seeds, not of thirty prompts"
    assert crossed_mean([[0.0, 0.0]] * 4) == (0.0, 0.0, 3) and crossed_mean([[0.0, 0.0]] * 4).p_value() == 1.0
    for wrong in ([], [[1.0]], [[1.0], [1.0, 2.0]], [[], []]):
        with pytest.raises(ValueError, match="two or more"):
            crossed_mean(wrong)


@pytest.mark.parametrize(("seeds", "luck"), [(3, 0.0), (3, 0.03), (3, 0.3), (5, 0.03), (5, 0.3)])
def test_the_crossed_interval_covers(seeds: int, luck: float) -> None:
    """Whether prompts, seeds or both decide: the figures of docs/statistics.md come from this simulation."""
    rng, runs = np.random.default_rng(seeds), 800
    samples = [crossed_mean(effects(rng, 60, seeds, 0.3, luck, 0.3).tolist()).interval() for _ in range(runs)]
    covered = sum(low <= 0 <= high for low, high in samples) / runs
    assert 0.92 <= covered <= 0.985


def restricted(b: int, c: int, n: int, shift: float) -> float:
    """The likeliest share of prompts that count for b alone, given the difference: the root of the score equation."""
    roots = np.roots([2 * n, (2 * n - b + c) * shift - b - c, -c * shift * (1 - shift)])
    return float(max(roots.real))


@pytest.mark.parametrize(("b", "c", "n"), [(12, 2, 50), (0, 0, 259), (1, 0, 30), (40, 40, 100), (7, 90, 120)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_score_interval_inverts_mcnemars_statistic(b: int, c: int, n: int, level: float) -> None:
    z = scipy_stats.norm.ppf((1 + level) / 2)
    for end, side in zip(paired_share_interval(b, c, n, level), (1, -1), strict=True):
        variance = n * (2 * restricted(b, c, n, end) + end * (1 - end))
        assert (b - c - n * end) / math.sqrt(variance) == pytest.approx(side * z, abs=1e-8)
    low, high = paired_share_interval(b, c, n, level)
    assert paired_share_interval(c, b, n, level) == pytest.approx((-high, -low), abs=1e-10)


def test_the_score_interval_at_its_edges() -> None:
    z2 = scipy_stats.norm.ppf(0.975) ** 2
    low, high = paired_share_interval(0, 0, 100)
    assert (low, high) == pytest.approx((-z2 / (100 + z2), z2 / (100 + z2)), abs=1e-10), "no discordant pair, no proof"
    assert paired_share_interval(50, 0, 50).high == 1.0 and paired_share_interval(0, 50, 50).low == -1.0
    assert 0.8 < paired_share_interval(50, 0, 50).low < 1
    with pytest.raises(ValueError, match="add up"):
        paired_share_interval(3, 3, 5)


def test_the_score_interval_agrees_with_mcnemars_test_of_statsmodels() -> None:
    """It excludes zero exactly where the uncorrected test rejects."""
    from statsmodels.stats.contingency_tables import mcnemar as reference

    for b in range(30):
        p = reference([[10, b], [8, 50]], exact=False, correction=False).pvalue
        low, high = paired_share_interval(b, 8, 68 + b)
        assert (low > 0 or high < 0) == (p < 0.05), b


@pytest.mark.parametrize("differences", [[1, -1, 1, 1, 0, 0, 1], [3, -1, 2, 0, 1, 1, -2, 3], [2] * 6, [0, 0, 0]])
def test_the_clustered_test_equals_scipys_permutations(differences: list[int]) -> None:
    def total(x, axis=-1):
        return np.sum(x, axis=axis)

    kind = {"permutation_type": "samples", "n_resamples": 1e6}
    expected = scipy_stats.permutation_test((np.array(differences),), total, **kind)
    assert clustered_mcnemar(differences) == pytest.approx(expected.pvalue, abs=1e-10)
    assert clustered_mcnemar([-x for x in differences]) == clustered_mcnemar(differences)


@pytest.mark.parametrize(("b", "c", "both"), [(0, 0, 5), (3, 3, 0), (2, 9, 30), (40, 11, 200), (150, 90, 60)])
def test_one_seed_in_each_cluster_is_mcnemars_test(b: int, c: int, both: int) -> None:
    a, other = [1] * b + [0] * c + [1] * both, [0] * b + [1] * c + [1] * both
    differences = [x - y for x, y in zip(a, other, strict=True)]
    assert clustered_mcnemar(differences) == pytest.approx(mcnemar(a, other), abs=1e-10)


def test_three_seeds_that_agree_are_one_test() -> None:
    once = [1] * 7 + [-1] * 2 + [0] * 20
    assert clustered_mcnemar([3 * x for x in once]) == pytest.approx(clustered_mcnemar(once), abs=1e-12)
    with pytest.raises(ValueError, match="each prompt"):
        clustered_mcnemar([])


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99, 0.999])
def test_the_fewest_discordant_prompts_are_just_enough(level: float) -> None:
    k = fewest_discordant(level)
    assert mcnemar([1] * k, [0] * k) <= 1 - level < mcnemar([1] * (k - 1), [0] * (k - 1))


def test_what_a_mean_can_detect_follows_its_freedom() -> None:
    assert Mean(0.0, 0.01, 2).detectable() > Mean(0.0, 0.01, 200).detectable() > 0.028
    assert math.isnan(Mean(0.0, 0.0, 5).detectable())


def ranked_rows(rng: np.random.Generator, size: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(shift, 1, size), rng.normal(0, 1, size + 7)


def resampled(rng: np.random.Generator, positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns are rows of the pool: all their scores are drawn together."""
    drawn = (part[..., rng.integers(part.shape[-1], size=part.shape[-1])] for part in (positive, negative))
    return tuple(drawn)  # type: ignore[return-value]


@pytest.mark.parametrize("shift", [0.0, 1.0, 1.8])
def test_the_interval_of_an_auc_is_that_of_a_bootstrap(shift: float) -> None:
    """To 15 % of its width: Hanley and McNeil suppose exponential scores, and a score interval leans to 1/2."""
    rng = np.random.default_rng(3)
    positive, negative = ranked_rows(rng, 60, shift)
    drawn = (resampled(rng, positive, negative) for _ in range(4000))
    low, high = np.quantile([auc(list(a), list(b)) for a, b in drawn], [0.025, 0.975])
    found = auc_interval(auc(list(positive), list(negative)), 60, 67)
    assert found == pytest.approx((low, high), abs=0.15 * (high - low))


@pytest.mark.parametrize("value", [0.0, 0.02, 0.5, 0.9, 1.0])
def test_the_limits_of_an_auc_solve_their_equation(value: float) -> None:
    z, positives, negatives = scipy_stats.norm.ppf(0.95), 30, 50
    interval = auc_interval(value, positives, negatives, 0.9)
    for a in (end for end in interval if 0 < end < 1):
        error = (a * (1 - a) + 29 * (a / (2 - a) - a**2) + 49 * (2 * a**2 / (1 + a) - a**2)) / 1500
        assert abs(value - a) == pytest.approx(z * math.sqrt(error), abs=1e-9)
    assert 0 <= interval.low <= value <= interval.high <= 1 and interval.high - interval.low > 0.02
    mirrored = auc_interval(1 - value, negatives, positives, 0.9)
    assert mirrored == pytest.approx((1 - interval.high, 1 - interval.low), abs=1e-9)


def test_two_orders_of_the_same_rows_are_compared_row_by_row() -> None:
    rng = np.random.default_rng(5)
    sides = ranked_rows(rng, 80, 1.2)
    positive, negative = (np.stack([side, side + rng.normal(0, 0.5, len(side))]) for side in sides)

    def difference(positive: np.ndarray, negative: np.ndarray) -> float:
        return auc(list(positive[0]), list(negative[0])) - auc(list(positive[1]), list(negative[1]))

    one, other = ((list(positive[i]), list(negative[i])) for i in (0, 1))
    value, error = auc_difference(one, other)
    drawn = [difference(*resampled(rng, positive, negative)) for _ in range(3000)]
    assert value == pytest.approx(difference(positive, negative), abs=1e-12)
    assert error == pytest.approx(np.std(drawn), rel=0.08)
    assert auc_difference(one, one) == (0.0, 0.0), "one order twice differs in nothing, whatever its rows"


def test_ties_and_infinite_scores_have_their_place_in_a_difference() -> None:
    one, other = ([1.0, 2.0, math.inf], [1.0, -math.inf]), ([0.0, 0.0, 0.0], [0.0, 0.0])
    assert auc_difference(one, other)[0] == pytest.approx(auc(*one) - 0.5)


def test_an_auc_of_no_rows_is_refused() -> None:
    for wrong in ((1.1, 3, 3), (0.5, 0, 3)):
        with pytest.raises(ValueError, match="some of both"):
            auc_interval(*wrong)
    with pytest.raises(ValueError, match="the same rows twice"):
        auc_difference(([1.0, 2.0], [0.0, 1.0]), ([1.0], [0.0, 1.0]))


@pytest.mark.parametrize(("a", "b"), [(132, 121), (160, 160), (0, 160), (0, 0), (80, 79)])
def test_the_difference_of_two_shares_is_newcombes(a: int, b: int) -> None:
    from statsmodels.stats.proportion import confint_proportions_2indep

    known = confint_proportions_2indep(a, 160, b, 160, method="newcomb", compare="diff")
    assert newcombe(a, 160, b, 160) == pytest.approx(known, abs=1e-10)
