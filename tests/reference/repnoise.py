"""RepNoise's step from its formula (arXiv 2405.14577), on the written-out GPT-2.

A batch is (ids, mask, labels) as lists would have it: [B, T] each, labels below 0 where no loss is taken.
"""

import math

import torch
from reference.gpt2 import forward, layer_norm, token_nll


def mean_loss(logits, labels):
    nll, spots = token_nll(logits, labels)
    return nll.sum() / spots.sum()


def difference(refusal, harmful):
    """m, one token at a time: 1 where a harmful token stands that the refusal does not have at this place."""
    (other, there, _), (ids, mask, _) = refusal, harmful
    m = torch.zeros(ids.shape, dtype=torch.float64)
    for row in range(ids.shape[0]):
        refused = [t for t, real in zip(other[row].tolist(), there[row].tolist(), strict=True) if real]
        answered = [t for t, real in zip(ids[row].tolist(), mask[row].tolist(), strict=True) if real]
        for place, token in enumerate(answered):
            m[row, place] = place >= len(refused) or refused[place] != token
    return m


def mean_distance(points):
    """Mean squared distance of different points."""
    n = len(points)
    return sum(((p - q) ** 2).sum() for p in points for q in points) / (n * n - n)


def mmd(xs, ys, spread):
    def kernel(u, v):
        square = ((u - v) ** 2).sum()
        return sum(torch.exp(-square / (spread * 2.0 ** (i - 2))) for i in range(5))

    def mean(us, vs):
        return sum(kernel(u, v) for u in us for v in vs) / (len(us) * len(vs))

    return mean(xs, xs) + mean(ys, ys) - 2 * mean(xs, ys)


def components(weights, align, refusal, harmful, noise, shape, spreads=None):
    """(l_stab, noise loss, log term, spreads): `spreads` fixes the kernels' widths, one for each layer."""
    ids, mask, labels = harmful
    trace = {}
    forward(weights, ids, mask, *shape, trace=trace)
    m = difference(refusal, harmful)
    layers, used = [], []
    for i, (out, eps) in enumerate(zip(trace["mlps"], noise, strict=True)):
        xs, ys = [(row * m[j, :, None]).flatten() for j, row in enumerate(out)], []
        ys = [(row * m[j, :, None]).flatten() for j, row in enumerate(eps)]
        used.append(mean_distance([p.detach() for p in (*xs, *ys)]) if spreads is None else spreads[i])
        layers.append(mmd(xs, ys, used[-1]))
    norm = weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"]
    losses = [mean_loss(layer_norm(x, *norm) @ weights["transformer.wte.weight"].T, labels) for x in trace["states"]]
    stable = mean_loss(forward(weights, *align[:2], *shape)[0], align[2])
    return stable, sum(layers) / len(layers), torch.log(1 + sum(losses) / len(losses)), used


def objective(weights, *batches, alpha, beta, **fixed):
    stable, noise, ascent, _ = components(weights, *batches, **fixed)
    return stable + beta * noise - alpha * ascent


def train(weights, steps, shape, alpha, beta, learning_rate):
    """Weights after one AdamW step for each (align, refusal, harmful, noise), and each step's gradient and parts."""
    weights = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    optimiser = torch.optim.AdamW(list(weights.values()), lr=learning_rate, weight_decay=0.0, foreach=False)
    found = []
    for step in steps:
        stable, noise, ascent, _ = components(weights, *step, shape)
        optimiser.zero_grad()
        (stable + beta * noise - alpha * ascent).backward()
        found.append(({name: p.grad.clone() for name, p in weights.items()},
                      {"stability": stable.item(), "noise": noise.item(), "ascent": ascent.item()}))  # fmt: skip
        assert math.isfinite(sum(found[-1][1].values()))
        optimiser.step()
    return {name: p.detach() for name, p in weights.items()}, found
