"""T-Vaccine's scores and steps from their formulas (arXiv 2410.09760), on the written-out GPT-2."""

import torch
from reference.vaccine import attention_gradients, loss_of, perturbation


def probabilities(weights, rows, shape, width):
    """p_l from the mean over rows of the norms of their own gradients; each row is a batch of one."""
    scores = torch.zeros(shape[0], dtype=torch.float64)
    for row in rows:
        gradients = attention_gradients(weights, row, shape, width)
        scores += torch.stack([(g**2).sum() ** 0.5 for g in gradients]) / len(rows)
    return scores / scores.sum()


def train(weights, batches, chosen, shape, width, rho, scope, learning_rate, decay):
    """Weights after one AdamW step per batch, in which the layers `chosen` for it move, their matrices with decay.

    Moments and their count belong to each tensor and rest while its layer does.
    """
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    moments = {name: (torch.zeros_like(tensor), torch.zeros_like(tensor), 0) for name, tensor in weights.items()}
    for batch, layers in zip(batches, chosen, strict=True):
        gradients = attention_gradients(weights, batch, shape, width)
        drift = dict(zip(layers, perturbation([gradients[i] for i in layers], rho, scope), strict=True))
        offsets = [drift.get(i, torch.zeros_like(g)) for i, g in enumerate(gradients)]
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
        found = torch.autograd.grad(loss_of(leaves, batch, shape, offsets), list(leaves.values()))
        for (name, tensor), g in zip(weights.items(), found, strict=True):
            if not any(name.startswith(f"transformer.h.{i}.") for i in layers):
                continue
            first, second, t = moments[name]
            first, second, t = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2, t + 1
            moments[name] = first, second, t
            kept = tensor * (1 - learning_rate * decay) if tensor.dim() == 2 else tensor
            weights[name] = kept - learning_rate * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    return weights
