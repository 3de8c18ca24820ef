"""IFD of one row from its definition (arXiv 2308.12032), on the written-out GPT-2."""

from reference.loss import mean_nll


def ratio(weights, ids, start, opening, shape, floor):
    """l(y | x) / l(y): the answer ids[start:] after its prompt, and after `opening` alone."""
    answer = list(ids[start:])
    alone = mean_nll(weights, [*opening, *answer], len(opening), shape)
    return mean_nll(weights, list(ids), start, shape) / max(alone, floor)


def ranking(ratios, highest_first):
    """Names from the first to be kept to the last; those over 1 are dropped."""
    good = [name for name in ratios if ratios[name] <= 1]
    return sorted(good, key=lambda name: ratios[name], reverse=highest_first)
