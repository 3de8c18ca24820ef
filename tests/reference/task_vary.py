"""How unlike the customer's rows a row is (arXiv 2506.05346), from vectors, with plain loops."""

import math


def cosine(a, b):
    inner = sum(x * y for x, y in zip(a, b, strict=True))
    return inner / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def scores(pool, users, over, similar=False):
    """Larger is kept; `similar` keeps the other end."""
    found = [[cosine(row, user) for user in users] for row in pool]
    if over == "mean":
        likeness = [sum(values) / len(values) for values in found]
        return likeness if similar else [-value for value in likeness]
    if over == "max":
        return [max(values) if similar else -max(values) for values in found]
    best = [math.inf] * len(pool)
    for u in range(len(users)):
        for i, row in enumerate(found):
            before = sum(other[u] > row[u] if similar else other[u] < row[u] for other in found)
            best[i] = min(best[i], before)
    return [-place for place in best]
