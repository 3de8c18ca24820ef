"""KL divergence of next-token distributions over response tokens, one token at a time."""

import math


def mean_kl(base_logits, changed_logits, labels):
    """KL(base || changed) summed over the vocabulary, averaged over the positions that predict a counted label."""
    total, count = 0.0, 0
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            if labels[row, t + 1] < 0:
                continue
            p, q = ([math.exp(v) for v in logits[row, t].double().tolist()] for logits in (base_logits, changed_logits))
            p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            count += 1
    return total / count
