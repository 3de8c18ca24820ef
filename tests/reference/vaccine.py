"""Vaccine's step from its formula (arXiv 2402.01109), on the written-out GPT-2."""

import torch
from reference.gpt2 import forward, token_nll


def loss_of(weights, batch, shape, offsets=None):
    ids, mask, labels = batch
    nll, spots = token_nll(forward(weights, ids, mask, *shape, offsets)[0], labels)
    return nll.sum() / spots.sum()


def attention_gradients(weights, batch, shape, width):
    """g_l of every layer: gradient of the loss with respect to a zero added to the attention output."""
    ids = batch[0]
    fixed = {name: tensor.detach() for name, tensor in weights.items()}
    zeros = [torch.zeros(*ids.shape, width, dtype=torch.float64, requires_grad=True) for _ in range(shape[0])]
    return torch.autograd.grad(loss_of(fixed, batch, shape, zeros), zeros)


def perturbation(gradients, rho, scope="batch"):
    if scope == "batch":
        norm = sum((g**2).sum() for g in gradients) ** 0.5
    else:
        norm = sum((g**2).sum((1, 2)) for g in gradients)[:, None, None] ** 0.5
    return [rho * g / (norm + 1e-7) for g in gradients]


def train(weights, batches, shape, width, rho, scope, learning_rate):
    """Weights after one AdamW step per batch, with the library's usual betas and epsilon."""
    weights = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    first = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    for t, batch in enumerate(batches, 1):
        offsets = perturbation(attention_gradients(weights, batch, shape, width), rho, scope)
        grads = torch.autograd.grad(loss_of(weights, batch, shape, offsets), list(weights.values()))
        for (name, tensor), g in zip(list(weights.items()), grads, strict=True):
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            step = (first[name] / (1 - 0.9**t)) / ((second[name] / (1 - 0.999**t)).sqrt() + 1e-8)
            weights[name] = (tensor - learning_rate * step).detach().requires_grad_()
    return {name: tensor.detach() for name, tensor in weights.items()}
