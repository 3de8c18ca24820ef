"""Scores of benign outliers (arXiv 2404.01099 and 2505.06843) on the written-out GPT-2, one row at a time.

A row is (token ids, where its answer starts); the answer's last token is the end of the text.
"""

import math

import torch
from reference.gpt2 import forward, layer_norm, token_nll

LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def gradient(weights, row, shape):
    """The gradient of the answer's mean loss, over the linear layers inside the decoder."""
    ids, start = torch.tensor([row[0]]), row[1]
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items() if any(part in name for part in LINEAR)}
    labels = torch.where(torch.arange(ids.shape[1]) < start, -100, ids)
    logits = forward({**weights, **leaves}, ids, torch.ones_like(ids), *shape)[0]
    loss = token_nll(logits, labels)[0].sum() / (ids.shape[1] - start)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(leaves.values()))])


def length(vector):
    return (vector**2).sum() ** 0.5


def towards_harm(weights, rows, harmful, own, head, shape):
    """<u(row), mean u(harmful) - mean u(own)> with the first `head` tokens of the anchors' answers."""
    way = 0.0
    for anchors, sign in ((harmful, 1), (own, -1)):
        for ids, start in anchors:
            g = gradient(weights, (ids[: start + head], start), shape)
            way = way + sign * g / length(g) / len(anchors)
    found = (gradient(weights, row, shape) for row in rows)
    return [((g * way).sum() / length(g)).item() for g in found]


def influence_on_itself(weights, rows, shape):
    found = ((gradient(weights, (ids, start), shape), len(ids) - start - 1) for ids, start in rows)
    return [math.log((g**2).sum().item() + 1) + math.log(words + 1) for g, words in found]


def likeness(weights, rows, harmful, shape):
    """The mean cosine with the anchors, of hidden states after the final norm at the token before the end."""

    def last(row):
        ids, trace = torch.tensor([row[0]]), {}
        forward(weights, ids, torch.ones_like(ids), *shape, trace=trace)
        norm = (weights[f"transformer.ln_f.{part}"] for part in ("weight", "bias"))
        state = layer_norm(trace["states"][-1], *norm)[0, -2]
        return state / length(state)

    anchors = [last(row) for row in harmful]
    return [sum((last(row) * a).sum().item() for a in anchors) / len(anchors) for row in rows]


def greedy(weights, ids, count, end, shape):
    """The likeliest answer of at most `count` tokens, without its end."""
    ids, start = list(ids), len(ids)
    while len(ids) < start + count:
        logits = forward(weights, torch.tensor([ids]), torch.ones(1, len(ids)), *shape)[0]
        if (token := logits[0, -1].argmax().item()) == end:
            break
        ids.append(token)
    return ids[start:]
