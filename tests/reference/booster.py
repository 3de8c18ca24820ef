"""Booster's step from its formula (arXiv 2409.01586), on the written-out GPT-2."""

import torch
from reference.gpt2 import forward, token_nll


def loss_of(weights, batch, shape):
    ids, mask, labels = batch
    nll, spots = token_nll(forward(weights, ids, mask, *shape)[0], labels)
    return nll.sum() / spots.sum()


def loss_and_gradient(weights, batch, shape):
    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in weights.items()}
    loss = loss_of(weights, batch, shape)
    return loss.item(), dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def direction(gradient):
    """The gradient over its length, the length taken over all tensors laid end to end."""
    length = torch.cat([g.flatten() for g in gradient.values()]).norm()
    return {name: g / (length + 1e-7) for name, g in gradient.items()}


def moved(weights, direction, length):
    return {name: tensor + length * direction[name] for name, tensor in weights.items()}


def step(weights, align, harmful, shape, lamb, alpha):
    """(gradient, loss components) of one step."""
    f, of_f = loss_and_gradient(weights, align, shape)
    h, q = loss_and_gradient(weights, harmful, shape)
    h_after, q_after = loss_and_gradient(moved(weights, direction(q), -alpha), harmful, shape)
    gradient = {name: of_f[name] + lamb * q[name] - lamb * q_after[name] for name in weights}
    return gradient, {"align": f, "harmful_before": h, "harmful_after": h_after, "regulariser": lamb * (h - h_after)}


def train(weights, batches, shape, lamb, alpha, learning_rate):
    """Weights after one AdamW step for each (align, harmful) pair, and each step's gradient and loss components."""
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    optimiser = torch.optim.AdamW(list(weights.values()), lr=learning_rate, weight_decay=0.0, foreach=False)
    steps = []
    for align, harmful in batches:
        gradient, components = step(weights, align, harmful, shape, lamb, alpha)
        for name, tensor in weights.items():
            tensor.grad = gradient[name]
        optimiser.step()
        steps.append((gradient, components))
    return weights, steps
