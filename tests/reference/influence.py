"""LESS (arXiv 2402.04333) and EL2N (arXiv 2107.07075) on the written-out GPT-2: own Adam, one backward per row."""

import torch
from reference.gpt2 import forward, token_nll


def adam(weights, loss, rates, betas, eps=1e-8):
    """(weights, m, v) after each step of Adam with these learning rates."""
    m = {name: torch.zeros_like(w) for name, w in weights.items()}
    v = dict(m)
    for step, rate in enumerate(rates, 1):
        weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
        grads = dict(zip(weights, torch.autograd.grad(loss(weights), list(weights.values())), strict=True))
        m = {name: betas[0] * m[name] + (1 - betas[0]) * g for name, g in grads.items()}
        v = {name: betas[1] * v[name] + (1 - betas[1]) * g**2 for name, g in grads.items()}
        weights = {
            name: w.detach()
            - rate * (m[name] / (1 - betas[0] ** step)) / ((v[name] / (1 - betas[1] ** step)).sqrt() + eps)
            for name, w in weights.items()
        }
        yield weights, m, v


def with_lora(base, lora, scale):
    """GPT-2's weights, stored as [inputs, outputs], plus scale (B A)^T; `lora` has NAME.A and NAME.B."""
    changed = dict(base)
    for name in {key[:-2] for key in lora}:
        changed[f"{name}.weight"] = base[f"{name}.weight"] + scale * (lora[f"{name}.B"] @ lora[f"{name}.A"]).T
    return changed


def token_mean(weights, batch, shape):
    ids, mask, labels = batch
    nll, spots = token_nll(forward(weights, ids, mask, *shape)[0], labels)
    return nll.sum() / spots.sum()


def row_gradients(weights, batch, model, shape):
    """One flat gradient of each row's mean loss; `model(weights)` are GPT-2's own."""
    weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
    found = []
    for j in range(batch[0].shape[0]):
        loss = token_mean(model(weights), tuple(t[j : j + 1] for t in batch), shape)
        grads = torch.autograd.grad(loss, list(weights.values()))
        found.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(found)


def adam_directions(grads, m, v, betas):
    m, v = (torch.cat([t.flatten() for t in moment.values()]) for moment in (m, v))
    return (betas[0] * m + (1 - betas[0]) * grads) / (betas[1] * v + (1 - betas[1]) * grads**2 + 1e-8) ** 0.5


def unit(vectors):
    return vectors / (vectors**2).sum(1, keepdim=True) ** 0.5


def less(points, rates, pool, subtasks, model, shape, betas, adam_features=True):
    """max over subtasks, mean over their rows, of the weighted sum over checkpoints of inner products."""
    total = [0.0] * len(subtasks)
    for (weights, m, v), rate in zip(points, rates, strict=True):
        own = row_gradients(weights, pool, model, shape)
        if adam_features:
            own = unit(adam_directions(own, m, v, betas))
        for s, target in enumerate(subtasks):
            others = unit(row_gradients(weights, target, model, shape))
            total[s] = total[s] + rate / sum(rates) * (own @ others.T).mean(1)
    return torch.stack(total).max(0).values


def el2n(points, pool, model, shape):
    ids, mask, labels = pool
    total = torch.zeros(ids.shape[0], dtype=torch.float64)
    for weights, *_ in points:
        logits = forward(model(weights), ids, mask, *shape)[0]
        for j in range(ids.shape[0]):
            norms = []
            for t in range(ids.shape[1] - 1):
                if labels[j, t + 1] >= 0:
                    p = logits[j, t].exp() / logits[j, t].exp().sum()
                    p = p.clone()
                    p[labels[j, t + 1]] -= 1
                    norms.append((p**2).sum() ** 0.5)
            total[j] += torch.stack(norms).mean() / len(points)
    return total
