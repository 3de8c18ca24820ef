"""Intervals and tests for shares and means, of one sample, of two, and in families."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any, NamedTuple


class Interval(NamedTuple):
    """A two-sided interval; (nan, nan) where the sample admits none."""

    low: float
    high: float


def check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected a number between 0 and 1 such as 0.95")


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval for a share, within [0, 1] (Wilson 1927; no continuity correction).

    With k = successes and z the normal quantile of (1 + level) / 2:

        (k + z^2 / 2 +- z sqrt(k (n - k) / n + z^2 / 4)) / (n + z^2)

    Raises ValueError unless 0 <= successes <= n and n >= 1.
    """
    check_level(level)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"got {successes} successes of {n}, expected 0 <= successes <= n and n >= 1")
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = successes + z * z / 2
    half = z * math.sqrt(successes * (n - successes) / n + z * z / 4)
    low = 0.0 if successes == 0 else (middle - half) / (n + z * z)
    high = 1.0 if successes == n else (middle + half) / (n + z * z)
    return Interval(low, high)


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval for the mean of independent values, such as one score for each seed.

    One value tells nothing of the spread between seeds: the answer is (nan, nan), and callers fall back to the
    Wilson interval over the prompts.  Raises ValueError for no values at all.
    """
    check_level(level)
    if not values:
        raise ValueError("got no values, expected at least one")
    if len(values) == 1:
        return Interval(math.nan, math.nan)
    from scipy.special import stdtrit

    mean = fmean(values)
    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * stdev(values) / math.sqrt(len(values))
    return Interval(mean - half, mean + half)


def share_interval(shares: Sequence[float], n: int, level: float = 0.95) -> Interval:
    """Interval for the mean over seeds of a share in [0, 1] that each seed measured on the same `n` prompts.

    One seed: Wilson.  Several: the wider of two on either side.  The t interval over seeds knows training luck but not
    the choice of prompts; Wilson on one set of prompts knows the prompts but not the luck.  Pooling the seeds' answers
    as independent would be too narrow, because they answer the same prompts.  Within [0, 1]; holds the mean.
    Raises ValueError for no shares, or n < 1.
    """
    if not shares:
        raise ValueError("got no shares, expected one for each seed")
    mean = fmean(shares)
    low, high = wilson(min(n, round(mean * n)), n, level)
    if len(shares) > 1:
        over_seeds = mean_interval(shares, level)
        low, high = min(low, over_seeds.low), max(high, over_seeds.high)
    return Interval(max(0.0, min(low, mean)), min(1.0, max(high, mean)))


def _check_pairs(a: Sequence[float], b: Sequence[float]) -> None:
    if len(a) != len(b) or not len(a):
        raise ValueError(f"got {len(a)} and {len(b)} values, expected the same prompts, at least one, on both sides")


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of mean(a) - mean(b), where a[i] and b[i] belong to the same prompt.

    Prompts are drawn with replacement (Efron 1979); the same seed gives the same interval.
    """
    check_level(level)
    _check_pairs(a, b)
    import numpy as np

    rng = np.random.default_rng(seed)
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    n = len(difference)
    means = [difference[rng.integers(n, size=n)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def mcnemar(a: Sequence[bool | int], b: Sequence[bool | int]) -> float:
    """Two-sided p-value of McNemar's exact test on paired 0/1 outcomes (McNemar 1947).

    Only the discordant pairs speak: under the null each falls on either side with probability 1/2.
    1.0 when no pair is discordant.
    """
    _check_pairs(a, b)
    if not {*a, *b} <= {0, 1}:
        raise ValueError("got values other than 0 and 1, expected paired 0/1 outcomes")
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values for a family of tests, in their order (Holm 1979, step-down): compare them with the level.

    p_(i) becomes max over j <= i of min(1, (m - j + 1) p_(j)); the chance of any false discovery stays below the level
    whatever the dependence between the tests.  Raises ValueError for a p-value outside [0, 1].
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError("got a p-value outside [0, 1], expected probabilities")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def clustered_interval(clusters: Sequence[Sequence[float]], level: float = 0.95) -> Interval:
    """Interval for the mean of values that come in clusters, such as the answers of several seeds to one prompt.

    Liang and Zeger 1986: with G clusters, N values, mean m and residual sums u_g = sum_i (x_gi - m),

        m +- t(G - 1) sqrt(G / (G - 1) * sum_g u_g^2) / N

    (nan, nan) for a single cluster.  Raises ValueError for no clusters or an empty one.
    """
    check_level(level)
    if not clusters or not all(clusters):
        raise ValueError("got no clusters or an empty one, expected at least one value in each")
    if len(clusters) == 1:
        return Interval(math.nan, math.nan)
    from scipy.special import stdtrit

    count, size = len(clusters), sum(map(len, clusters))
    mean = math.fsum(x for cluster in clusters for x in cluster) / size
    spread = math.fsum(math.fsum(x - mean for x in cluster) ** 2 for cluster in clusters)
    half = float(stdtrit(count - 1, (1 + level) / 2)) * math.sqrt(count / (count - 1) * spread) / size
    return Interval(mean - half, mean + half)


def detectable_difference(differences: Sequence[float], level: float = 0.95, power: float = 0.8) -> float:
    """The smallest true mean that a two-sided paired t test on this many differences of this spread finds with `power`.

    By the noncentral t distribution, in the unit of the differences; nan for fewer than two of them, or where they do
    not differ, so that nothing is known of their spread.
    """
    n = len(differences)
    error = stdev(differences) / math.sqrt(n) if n > 1 else math.nan
    return Mean(math.nan, error, n - 1).detectable(level, power)


class Mean(NamedTuple):
    """An estimated mean with its standard error and the degrees of freedom of that error."""

    value: float
    error: float
    freedom: float

    def interval(self, level: float = 0.95) -> Interval:
        """Student's t interval; a point where the error is zero."""
        check_level(level)
        from scipy.special import stdtrit

        half = self.error * float(stdtrit(self.freedom, (1 + level) / 2)) if self.error else 0.0
        return Interval(self.value - half, self.value + half)

    def p_value(self) -> float:
        """Two-sided, of the t test that the true mean is zero."""
        from scipy.special import stdtr

        if not self.error:
            return float(self.value == 0)
        return 2 * float(stdtr(self.freedom, -abs(self.value) / self.error))

    def detectable(self, level: float = 0.95, power: float = 0.8) -> float:
        """The smallest true mean that the t test at `level` finds with `power`; nan for an error of zero or nan."""
        check_level(level)
        if not 1 - level < power < 1:
            raise ValueError(f"power is {power}, expected a number between 1 - level and 1 such as 0.8")
        if not self.error > 0:
            return math.nan
        from scipy.optimize import brentq
        from scipy.special import stdtrit
        from scipy.stats import nct

        limit = float(stdtrit(self.freedom, (1 + level) / 2))

        def excess(shift: float) -> float:
            other_side = float(nct.cdf(-limit, self.freedom, shift))  # NaN where it is too small for scipy
            return float(nct.sf(limit, self.freedom, shift)) + (0.0 if math.isnan(other_side) else other_side) - power

        enough = limit
        while excess(enough) < 0:
            enough *= 2
        shift: Any = brentq(excess, 0.0, enough, xtol=1e-12)
        return float(shift) * self.error


def crossed_mean(values: Sequence[Sequence[float]]) -> Mean:
    """The mean of values[prompt][seed], where prompts and seeds are both drawn from more of their kind.

    Every seed answers the same prompts, so neither all values nor the seeds' means are independent.  Two-way random
    effects (Clark 1973): with n prompts, S seeds and the mean squares of prompts, seeds and rest,

        variance = (MS_prompt + max(0, MS_seed - MS_rest)) / (n S)

    and Satterthwaite's degrees of freedom (1946).  One seed: the paired t test.  Coverage in docs/statistics.md.
    Raises ValueError unless there are two prompts or more with the same number of seeds, at least one.
    """
    n, count = len(values), len(values[0]) if values else 0
    if n < 2 or not count or any(len(row) != count for row in values):
        raise ValueError(f"got {n} prompts, expected two or more, each with one value for every seed")
    prompts, seeds = [fmean(row) for row in values], [fmean(column) for column in zip(*values, strict=True)]
    mean = fmean(prompts)
    by_prompt = count * math.fsum((x - mean) ** 2 for x in prompts) / (n - 1)
    if count == 1:
        return Mean(mean, math.sqrt(by_prompt / n), n - 1)
    by_seed = n * math.fsum((x - mean) ** 2 for x in seeds) / (count - 1)
    rest = math.fsum((x - prompts[i] - seeds[j] + mean) ** 2 for i, row in enumerate(values)
                     for j, x in enumerate(row)) / ((n - 1) * (count - 1))  # fmt: skip
    luck = max(0.0, by_seed - rest)
    total = by_prompt + luck
    if not total > 0:
        return Mean(mean, 0.0, n - 1)
    parts = [by_prompt**2 / (n - 1)]
    if luck:
        parts += [by_seed**2 / (count - 1), rest**2 / ((n - 1) * (count - 1))]
    return Mean(mean, math.sqrt(total / (n * count)), total**2 / sum(parts))


def paired_share_interval(only_a: float, only_b: float, n: int, level: float = 0.95) -> Interval:
    """Score interval for the difference of two shares of the same n prompts (Tango 1998): McNemar's test, inverted.

    `only_a` prompts count for the first arm alone, `only_b` for the second alone.  Unlike a bootstrap it does not
    shrink to a point where no prompt is discordant.  Raises ValueError for impossible counts.
    """
    check_level(level)
    if n < 1 or min(only_a, only_b) < 0 or only_a + only_b > n:
        raise ValueError(f"got {only_a} and {only_b} discordant of {n}, expected counts that add up to at most n >= 1")
    from scipy.optimize import brentq

    z = NormalDist().inv_cdf((1 + level) / 2)

    def score(shift: float) -> float:
        b = (2 * n - only_a + only_b) * shift - only_a - only_b
        q = (math.sqrt(max(0.0, b * b + 8 * n * only_b * shift * (1 - shift))) - b) / (4 * n)
        variance = n * (2 * q + shift * (1 - shift))
        return (only_a - only_b - n * shift) / math.sqrt(variance) if variance > 0 else 0.0

    value, edge = (only_a - only_b) / n, 1 - 1e-12
    ends: list[Any] = [
        -1.0 if value <= -edge else brentq(lambda shift: score(shift) - z, -edge, value, xtol=1e-14),
        1.0 if value >= edge else brentq(lambda shift: score(shift) + z, value, edge, xtol=1e-14),
    ]
    return Interval(float(ends[0]), float(ends[1]))


def newcombe(a: int, n: int, b: int, m: int, level: float = 0.95) -> Interval:
    """Interval for a / n - b / m, two shares of independent samples (Newcombe 1998, method 10, from Wilson's).

    Where both were taken on the same rows it is somewhat too wide: `paired_share_interval` uses what the pairs know.
    """
    p, q, first, second = a / n, b / m, wilson(a, n, level), wilson(b, m, level)
    below = math.hypot(p - first.low, second.high - q)
    above = math.hypot(first.high - p, q - second.low)
    return Interval(p - q - below, p - q + above)


def clustered_mcnemar(differences: Sequence[int]) -> float:
    """Exact two-sided p-value of paired 0/1 outcomes in clusters: one whole number per prompt, summed over its seeds.

    Under the null the arms are exchangeable within a prompt, so that each sum is as likely with either sign; the
    p-value is the chance of a total at least as large (sign-flip test, Fisher 1935; the exact form of Durkalski et al.
    2003).  With one seed it is `mcnemar`.  Raises ValueError for no prompts.
    """
    if not differences:
        raise ValueError("got no differences, expected one for each prompt")
    import numpy as np
    from scipy.stats import binom

    total, chances = abs(sum(differences)), np.ones(1)
    for size, count in Counter(map(abs, differences)).items():
        if size:  # the sum of `count` signs, `size` apart: +size and -size, so steps of 2 size
            part = np.zeros(2 * size * count + 1)
            part[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
            chances = np.convolve(chances, part)
    middle = len(chances) // 2
    return min(1.0, float(chances[middle + total :].sum() + chances[: middle - total + 1].sum()))


def fewest_discordant(level: float = 0.95) -> int:
    """How many prompts must change, all one way, before McNemar's exact test can tell two arms apart at all."""
    check_level(level)
    return max(1, math.ceil(1 - math.log2(1 - level)))


def cohen_kappa(a: Sequence[object], b: Sequence[object], level: float = 0.95) -> tuple[float, Interval]:
    """Agreement of two judges beyond chance on the same items, with its interval (Cohen 1960; Fleiss et al. 1969).

    kappa = (p_o - p_e) / (1 - p_e); nan where both give one and the same label throughout.
    """
    check_level(level)
    if len(a) != len(b) or not a:
        raise ValueError(f"got {len(a)} and {len(b)} verdicts, expected the same items, at least one, on both sides")
    n, labels = len(a), list(dict.fromkeys([*a, *b]))
    joint = Counter(zip(a, b, strict=True))
    first, second = Counter(a), Counter(b)
    observed = sum(joint[label, label] for label in labels) / n
    chance = sum(first[label] * second[label] for label in labels) / n**2
    if chance == 1:
        return math.nan, Interval(math.nan, math.nan)
    kappa = (observed - chance) / (1 - chance)
    own = sum(joint[x, x] / n * (1 - (first[x] + second[x]) / n * (1 - kappa)) ** 2 for x in labels)
    other = (1 - kappa) ** 2 * sum(joint[x, y] / n * ((second[x] + first[y]) / n) ** 2
                                   for x in labels for y in labels if x != y)  # fmt: skip
    variance = (own + other - (kappa - chance * (1 - kappa)) ** 2) / (n * (1 - chance) ** 2)
    half = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(max(0.0, variance))
    return kappa, Interval(kappa - half, kappa + half)
