"""DSIR's log importance weights from their definition (arXiv 2302.03169), with dense vectors of counts."""

import itertools

import numpy as np


def tokens(text):
    """Runs of word characters and runs of other signs, lower-cased, by walking through the characters."""
    found, kind = [], None
    for sign in text.lower():
        now = "space" if sign.isspace() else "word" if sign.isalnum() or sign == "_" else "other"
        if now != "space" and now == kind:
            found[-1] += sign
        elif now != "space":
            found.append(sign)
        kind = now
    return found


def counts(text, bucket, buckets):
    words = tokens(text)
    vector = np.zeros(buckets)
    for word in words:
        vector[bucket(word) % buckets] += 1
    for first, second in itertools.pairwise(words):
        vector[bucket(first + " " + second) % buckets] += 1
    return vector


def log_weights(pool, target, bucket, buckets, smoothing):
    """One number for each text of the pool; `bucket` maps an n-gram to a whole number."""
    raw = sum(counts(text, bucket, buckets) for text in pool)
    wanted = sum(counts(text, bucket, buckets) for text in target) + smoothing
    ratio = np.log(wanted / wanted.sum() + 1e-8) - np.log(raw / raw.sum() + 1e-8)
    return [float(counts(text, bucket, buckets) @ ratio) for text in pool]
