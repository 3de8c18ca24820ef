"""A row's vector on the written-out GPT-2: the mean of its last hidden states after the final norm."""

import torch
from reference.gpt2 import forward, layer_norm


def vector(weights, ids, start, shape, tokens, normalise=True):
    row, trace = torch.tensor([ids]), {}
    forward(weights, row, torch.ones_like(row), *shape, trace=trace)
    hidden = layer_norm(trace["states"][-1], weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"])[0]
    places = {"all": range(len(ids)), "prompt": range(start), "response": range(start, len(ids)),
              "last": [len(ids) - 2]}[tokens]  # fmt: skip
    mean = sum(hidden[place] for place in places) / len(places)
    return (mean / mean.norm() if normalise else mean).numpy()
