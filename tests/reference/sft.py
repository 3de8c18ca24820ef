"""Plain training on the mean loss of response tokens, with AdamW written out, on the written-out GPT-2."""

import torch
from reference.gpt2 import forward, token_nll


def loss_of(weights, batch, shape):
    ids, mask, labels = batch
    nll, spots = token_nll(forward(weights, ids, mask, *shape)[0], labels)
    return nll.sum() / spots.sum()


def train(weights, batches, shape, learning_rate):
    """Weights after one AdamW step per batch, with the library's usual betas and epsilon."""
    weights = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    first = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    for t, batch in enumerate(batches, 1):
        grads = torch.autograd.grad(loss_of(weights, batch, shape), list(weights.values()))
        for (name, tensor), g in zip(list(weights.items()), grads, strict=True):
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            step = (first[name] / (1 - 0.9**t)) / ((second[name] / (1 - 0.999**t)).sqrt() + 1e-8)
            weights[name] = (tensor - learning_rate * step).detach().requires_grad_()
    return {name: tensor.detach() for name, tensor in weights.items()}
