"""SEAL's alternation (arXiv 2410.07471, hanshen95/SEAL), on the written-out GPT-2."""

import torch
from reference.gpt2 import forward, token_nll


def row_means(weights, batch, shape):
    ids, mask, labels = batch
    nll, spots = token_nll(forward(weights, ids, mask, *shape)[0], labels)
    return nll.sum(1) / spots.sum(1)


def train(weights, steps, rows, shape, ul, decay, per_epoch, rates, betas_theta, betas_w, clip):
    """(weights, w) after a step of AdamW on theta and one of Adam on w for each (chosen, pool batch, safe batch)."""
    weights = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    w = torch.full((rows,), 0.1, dtype=torch.float64, requires_grad=True)
    theta_step = torch.optim.AdamW(list(weights.values()), lr=rates[0], betas=betas_theta, weight_decay=0.0)
    w_step = torch.optim.Adam([w], lr=rates[1], betas=betas_w)
    for count, (chosen, pool, safe) in enumerate(steps):
        share = ul - decay * (count // per_epoch)
        sigma = (rows * torch.softmax(w, 0))[chosen]
        losses = row_means(weights, pool, shape)
        theta_loss = share * row_means(weights, safe, shape).mean() + (1 - share) * (sigma.detach() * losses).mean()
        for tensor, grad in zip(weights.values(), torch.autograd.grad(theta_loss, list(weights.values())), strict=True):
            tensor.grad = grad
        w.grad = torch.autograd.grad((sigma * losses.detach()).mean(), w)[0]
        if w.grad.norm() > clip:
            w.grad *= clip / w.grad.norm()
        theta_step.step()
        w_step.step()
    return {name: tensor.detach() for name, tensor in weights.items()}, w.detach()
