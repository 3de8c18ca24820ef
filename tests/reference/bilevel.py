"""Pharmacist's two levels (arXiv 2510.10085): a quadratic toy, and the gradients on the written-out GPT-2."""

import torch
from reference.gpt2 import forward, token_nll


class Toy:
    """l_j(x) = |x - a_j|^2 / 2, h(x) = c |x - b|^2 / 2 with Hessian c I, f(x) = sum log cosh(x - d)."""

    def __init__(self, rows, width, c, seed=0):
        source = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=source, dtype=torch.float64)

        self.a, self.b, self.d, self.start, self.c = draw(rows, width), draw(width), draw(width), draw(width), c

    def after(self, w, chosen, eta, alpha):
        """theta' of one lower step, weighted by N gamma and averaged over the chosen rows, and one attack step."""
        weight = (w.softmax(0) * len(w))[chosen] / len(chosen)
        lower = self.start - eta * (weight[:, None] * (self.start - self.a[chosen])).sum(0)
        return lower - alpha * self.c * (lower - self.b)

    def value(self, w, chosen, eta, alpha):
        return torch.log(torch.cosh(self.after(w, chosen, eta, alpha) - self.d)).sum()

    def slopes(self, w, chosen, eta, alpha):
        """s_j = < grad f(theta'), grad l_j(theta_0) > of the chosen rows."""
        return (self.start - self.a[chosen]) @ torch.tanh(self.after(w, chosen, eta, alpha) - self.d)


def finite_difference(value, w, step=1e-5):
    """dF/dw by central differences."""
    found = torch.empty_like(w)
    for i in range(len(w)):
        shift = torch.zeros_like(w)
        shift[i] = step
        found[i] = (value(w + shift) - value(w - shift)) / (2 * step)
    return found


def row_means(weights, batch, shape):
    """l_j: mean loss over the response tokens of each row."""
    ids, mask, labels = batch
    nll, spots = token_nll(forward(weights, ids, mask, *shape)[0], labels)
    return nll.sum(1) / spots.sum(1)


def token_mean(weights, batch, shape):
    ids, mask, labels = batch
    nll, spots = token_nll(forward(weights, ids, mask, *shape)[0], labels)
    return nll.sum() / spots.sum()


def gradient(loss, weights):
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def moved(weights, direction, factor):
    return {name: (tensor + factor * direction[name]).detach().requires_grad_() for name, tensor in weights.items()}


def target(weights, train, gamma, harmful, validation, shape, eta, alpha):
    """grad f(theta') with theta' = theta* - alpha grad h(theta*), theta* = theta_0 - eta mean_j gamma_j grad l_j."""
    weights = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    lower = gradient((gamma * row_means(weights, train, shape)).mean(), weights)
    star = moved(weights, lower, -eta)
    attacked = moved(star, gradient(token_mean(star, harmful, shape), star), -alpha)
    return gradient(token_mean(attacked, validation, shape), attacked)


def slopes(weights, train, direction, shape):
    """s_j of each row by its own backward pass."""
    weights = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    found = []
    for j in range(train[0].shape[0]):
        grads = gradient(row_means(weights, tuple(t[j : j + 1] for t in train), shape)[0], weights)
        found.append(sum((grads[name] * direction[name]).sum() for name in grads))
    return torch.stack(found)
