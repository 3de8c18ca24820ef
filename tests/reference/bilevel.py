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


def stepped(weights, loss, length, normalise=False):
    """Weights after a gradient step that stays differentiable; `normalise`: along the unit gradient."""
    grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    norm = torch.cat([g.flatten() for g in grads]).norm() if normalise else 1.0
    return {name: tensor - length * g / norm for (name, tensor), g in zip(weights.items(), grads, strict=True)}


def value(weights, w, chosen, train, harmful, validation, shape, eta, alpha, normalise=False):
    """F(w) = f(theta'(w))."""
    start = {name: tensor.detach().clone().requires_grad_() for name, tensor in weights.items()}
    share = (w.softmax(0) * len(w))[chosen] / len(chosen)
    star = stepped(start, (share * row_means(start, train, shape)).sum(), eta)
    attacked = stepped(star, token_mean(star, harmful, shape), alpha, normalise)
    return token_mean(attacked, validation, shape)


def first_order(weights, w, chosen, train, harmful, validation, shape, eta, alpha):
    """dF/dw with the attack's derivative I - alpha H replaced by 1 - alpha: the printed update, by autograd."""
    w = w.detach().clone().requires_grad_()
    sigma = (w.softmax(0) * len(w))[chosen]
    direction = target(weights, train, sigma.detach(), harmful, validation, shape, eta, alpha)
    matched = (sigma * slopes(weights, train, direction, shape)).mean()
    return -eta * (1 - alpha) * torch.autograd.grad(matched, w)[0]


def learn(weights, steps, rows, shape, eta, alpha, learning_rate, exact, betas=(0.9, 0.999)):
    """w after a step of Adam or of plain descent for each (chosen, train, harmful, validation), from 0.1 throughout."""
    w = torch.full((rows,), 0.1, dtype=torch.float64, requires_grad=True)
    plain = betas is None
    optimiser = torch.optim.SGD([w], lr=learning_rate) if plain else torch.optim.Adam([w], learning_rate, betas)
    for chosen, *batches in steps:
        if exact:
            w.grad = torch.autograd.grad(value(weights, w, chosen, *batches, shape, eta, alpha), w)[0]
        else:
            w.grad = first_order(weights, w, chosen, *batches, shape, eta, alpha)
        optimiser.step()
    return w.detach()


def matches(weights, pool, harmful, validation, shape, alpha, summed):
    """< grad f(theta'), grad l_j(theta_0) >, theta' after a harmful step of length alpha; l_j a mean, or summed."""
    weights = {name: tensor.clone().requires_grad_() for name, tensor in weights.items() if name != "lm_head.weight"}
    attack = gradient(token_mean(weights, harmful, shape), weights)
    length = torch.cat([g.flatten() for g in attack.values()]).norm()
    attacked = moved(weights, attack, -alpha / length)
    found = slopes(weights, pool, gradient(token_mean(attacked, validation, shape), attacked), shape)
    return found * token_nll(forward(weights, pool[0], pool[1], *shape)[0], pool[2])[1].sum(1) if summed else found
