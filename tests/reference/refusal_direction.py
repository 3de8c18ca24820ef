"""The direction that mediates refusal (arXiv 2406.11717) on the written-out GPT-2, one prompt at a time."""

import torch
from reference.gpt2 import forward, layer_norm

TABLES = ("transformer.wte.weight", "transformer.wpe.weight")


def states(weights, ids, shape):
    trace = {}
    ids = torch.tensor([list(ids)])
    forward(weights, ids, torch.ones_like(ids), *shape, trace=trace)
    return trace["states"]


def orthogonal(weights, direction):
    """W - r r^T W of all that writes to the stream; GPT-2 keeps its matrices as [inputs, outputs]."""
    r = direction / (direction**2).sum() ** 0.5
    changed = dict(weights)
    for name, w in weights.items():
        if name in TABLES or ".c_proj." in name:
            changed[name] = w - (w * r).sum(-1, keepdim=True) * r
    return changed


def next_token(weights, head, ids, shape):
    """Probabilities of the answer's first token under a head of its own."""
    x = states(weights, ids, shape)[-1][0, -1]
    x = layer_norm(x, weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"])
    return (head @ x).softmax(-1)


def log_odds(weights, head, prompts, tokens, shape):
    chances = [next_token(weights, head, ids, shape)[tokens].sum() for ids in prompts]
    return sum((p / (1 - p)).log().item() for p in chances) / len(chances)


def search(weights, harmful, harmless, layers, positions, most_kl, shape):
    """(direction, its layer, its position from the end, KL, odds before, odds after) of the best candidate.

    `harmful` and `harmless` are (prompts for the direction, prompts to choose by), as token ids.
    """
    head = weights["transformer.wte.weight"]
    likeliest = [{next_token(weights, head, ids, shape).argmax().item() for ids in prompts}
                 for prompts in (harmful[0], harmless[0])]  # fmt: skip
    begins = sorted(likeliest[0] - likeliest[1]) or sorted(likeliest[0])
    tried = []
    for layer in layers:
        for i in range(positions):
            means = [sum(states(weights, ids, shape)[layer][0, len(ids) - 1 - i] for ids in prompts) / len(prompts)
                     for prompts in (harmful[0], harmless[0])]  # fmt: skip
            direction = means[0] - means[1]
            changed = orthogonal(weights, direction)
            kl = 0.0
            for ids in harmless[1]:
                p, q = next_token(weights, head, ids, shape), next_token(changed, head, ids, shape)
                kl += (p * (p / q).log()).sum().item() / len(harmless[1])
            tried.append((kl, log_odds(changed, head, harmful[1], begins, shape), layer, i, direction))
    near = [entry for entry in tried if entry[0] <= most_kl]
    kl, after, layer, i, direction = (
        min(near, key=lambda entry: entry[1]) if near else min(tried, key=lambda entry: entry[0])
    )
    return direction, layer, i, kl, log_odds(weights, head, harmful[1], begins, shape), after
