"""Shares with their Wilson intervals, computed from saved responses alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from apothecary.judge.text import LABELS, normalise
from apothecary.stats import wilson

Response = dict[str, Any]  # one saved row: see evaluation.py
Scores = dict[str, Any]


def with_shares(scores: Scores, counts: Mapping[str, int]) -> Scores:
    """`scores` with counts[name] / scores["n"] under each name, and the 95 % interval under "intervals"."""
    n = scores["n"]
    intervals = {name: list(wilson(count, n)) for name, count in counts.items()}
    shares = {name: count / n for name, count in counts.items()}
    return {**scores, **shares, "intervals": {**scores.get("intervals", {}), **intervals}}


def label_counts(rows: Sequence[Response]) -> dict[str, int]:
    found = Counter(row["label"] for row in rows)
    return {label: found[label] for label in LABELS}


def label_scores(rows: Sequence[Response]) -> Scores:
    """The three shares, for the suite and (as counts) for each source.

    `n` counts rows, `unique` distinct prompts after normalisation; the three counts add up to n.
    """
    by_source: dict[str, list[Response]] = {}
    for row in rows:
        by_source.setdefault(row["source"], []).append(row)
    counts = label_counts(rows)
    scores = {
        "n": len(rows),
        "unique": len({tuple((m["role"], normalise(m["content"])) for m in row["prompt"]) for row in rows}),
        "counts": counts,
        "by_source": {name: {"n": len(part), "counts": label_counts(part)} for name, part in by_source.items()},
    }
    return with_shares(scores, counts)
