"""Mean negative log-likelihood of an answer, token by token, on the written-out GPT-2."""

import torch
from reference.gpt2 import forward


def mean_nll(weights, ids, start, shape):
    """Of ids[start:] given ids[:start]; the model reads one row without padding."""
    row = torch.tensor([ids])
    logits, _ = forward(weights, row, torch.ones_like(row), *shape)
    total = 0.0
    for place in range(start, len(ids)):
        scores = logits[0, place - 1]
        total += torch.log(torch.exp(scores).sum()).item() - scores[ids[place]].item()
    return total / (len(ids) - start)
