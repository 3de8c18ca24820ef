"""Intervals and paired tests: a number without an interval is not shown, and two differ only after a paired test."""

from apothecary.stats.ranks import auc, auc_difference, auc_interval, rank_correlation
from apothecary.stats.shares import (
    Interval,
    Mean,
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
    share_interval,
    wilson,
)

__all__ = [
    "Interval",
    "Mean",
    "auc",
    "auc_difference",
    "auc_interval",
    "clustered_interval",
    "clustered_mcnemar",
    "cohen_kappa",
    "crossed_mean",
    "detectable_difference",
    "fewest_discordant",
    "holm",
    "mcnemar",
    "mean_interval",
    "newcombe",
    "paired_bootstrap",
    "paired_share_interval",
    "rank_correlation",
    "share_interval",
    "wilson",
]
