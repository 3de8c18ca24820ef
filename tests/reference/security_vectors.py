"""Training of security vectors from its formula (arXiv 2311.02105, methods.md 2.3), on the written-out GPT-2.

`vectors` holds A and B by the name of the weight that they change: W + scale * (B A)^T, since GPT-2 keeps W transposed.
"""

import torch
from reference.gpt2 import forward, token_nll


def with_vectors(theta, vectors, scale):
    changed = dict(theta)
    for name, (a, b) in vectors.items():
        changed[name] = theta[name] + scale * (b @ a).T
    return changed


def nll(weights, batch, shape):
    ids, mask, labels = batch
    losses, spots = token_nll(forward(weights, ids, mask, *shape)[0], labels)
    return losses.sum() / spots.sum()


def kl(base, changed, batch, shape):
    """sum_v p_base log(p_base / p_changed), averaged over the positions that predict a response token."""
    ids, mask, labels = batch
    p, q = (forward(weights, ids, mask, *shape)[0].softmax(-1) for weights in (base, changed))
    terms = (p * (p.log() - q.log())).sum(-1)
    spots = labels[:, 1:] >= 0
    return (terms[:, :-1] * spots).sum() / spots.sum()


def inner_loop(theta, vectors, draws, shape, scale, eta):
    """theta after one step of gradient descent on each harmful draw, under vectors that stay as they are."""
    for batch in draws:
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in theta.items()}
        loss = nll(with_vectors(leaves, vectors, scale), batch, shape)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        theta = {name: (tensor - eta * g).detach() for (name, tensor), g in zip(leaves.items(), gradients, strict=True)}
    return theta


def train(theta, vectors, steps, shape, scale, lamb, eta, learning_rate):
    """(vectors after one AdamW step for each of `steps`, {harmful NLL at theta, at theta', KL} of each step).

    A step is (harmful batch, benign batch, harmful draws of the inner loop).
    """
    names = list(vectors)
    leaves = [tensor.detach().clone().requires_grad_() for name in names for tensor in vectors[name]]
    optimiser = torch.optim.AdamW(leaves, lr=learning_rate, weight_decay=0.0, foreach=False)
    seen = []
    for harmful, benign, draws in steps:
        current = dict(zip(names, zip(leaves[::2], leaves[1::2], strict=True), strict=True))
        fixed = {name: (a.detach(), b.detach()) for name, (a, b) in current.items()}
        moved = inner_loop(theta, fixed, draws, shape, scale, eta)
        harmful_loss = nll(with_vectors(moved, current, scale), harmful, shape)
        divergence = kl(moved, with_vectors(moved, current, scale), benign, shape)
        optimiser.zero_grad()
        (harmful_loss + lamb * divergence).backward()
        at_theta = nll(with_vectors(theta, fixed, scale), harmful, shape)
        seen.append((at_theta.item(), harmful_loss.item(), divergence.item()))
        optimiser.step()
    after = [leaf.detach() for leaf in leaves]
    return dict(zip(names, zip(after[::2], after[1::2], strict=True), strict=True)), seen


def customer(theta, vectors, delta, batches, shape, scale, learning_rate):
    """What the customer's parameters are after one AdamW step per batch, beside vectors that stand still.

    `delta` holds (A, B) by the name of the weight that they change, as `vectors` does; None: the weights themselves
    learn.  The vectors take part in every forward and are in nothing that is returned.
    """
    start = theta if delta is None else {(name, i): part for name, pair in delta.items() for i, part in enumerate(pair)}
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in start.items()}
    optimiser = torch.optim.AdamW(list(leaves.values()), lr=learning_rate, weight_decay=0.0, foreach=False)
    for batch in batches:
        own = leaves if delta is None else with_vectors(theta, pairs(leaves), scale)
        optimiser.zero_grad()
        nll(with_vectors(own, vectors, scale), batch, shape).backward()
        optimiser.step()
    after = {name: leaf.detach() for name, leaf in leaves.items()}
    return after if delta is None else pairs(after)


def pairs(leaves):
    """{weight: (A, B)} of {(weight, 0): A, (weight, 1): B}."""
    return {name: (leaves[name, 0], leaves[name, 1]) for name, i in leaves if i == 0}
