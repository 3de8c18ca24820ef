"""GPT-2 written out in plain tensor operations: no hooks, no library layers.

B rows, T tokens, D hidden, H heads.  `weights` are named as in transformers' GPT2LMHeadModel; the head is tied.
"""

import math

import torch


def layer_norm(x, weight, bias, eps=1e-5):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weight + bias


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(x, w, heads, allowed):
    batch, length, width = x.shape
    q, k, v = (x @ w["c_attn.weight"] + w["c_attn.bias"]).split(width, dim=-1)
    q, k, v = (t.view(batch, length, heads, width // heads).transpose(1, 2) for t in (q, k, v))
    logits = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).masked_fill(~allowed, -1e300)
    mixed = (logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
    return mixed @ w["c_proj.weight"] + w["c_proj.bias"]


def forward(weights, ids, mask, layers, heads, offsets=None, trace=None):
    """(logits [B, T, V], attention outputs [B, T, D] of each layer before its offset).

    A dictionary given as `trace` takes `mlps`, the MLP output of each layer, and `states`, the hidden states before,
    between and after the layers.
    """
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    allowed = causal[None, None] & mask.bool()[:, None, None, :]
    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][:length]
    outputs, mlps, states = [], [], [x]
    for i in range(layers):
        start = f"transformer.h.{i}."
        w = {name.removeprefix(start): tensor for name, tensor in weights.items() if name.startswith(start)}
        attn = {name.removeprefix("attn."): tensor for name, tensor in w.items() if name.startswith("attn.")}
        out = attention(layer_norm(x, w["ln_1.weight"], w["ln_1.bias"]), attn, heads, allowed)
        outputs.append(out)
        x = x + (out if offsets is None else out + offsets[i])
        inner = gelu(layer_norm(x, w["ln_2.weight"], w["ln_2.bias"]) @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"])
        mlps.append(inner @ w["mlp.c_proj.weight"] + w["mlp.c_proj.bias"])
        x = x + mlps[-1]
        states.append(x)
    if trace is not None:
        trace.update(mlps=mlps, states=states)
    x = layer_norm(x, weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"])
    return x @ weights["transformer.wte.weight"].T, outputs


def token_nll(logits, labels):
    """Negative log-probability of each next token [B, T-1] and which of them count; labels below 0 are ignored."""
    spots = labels[:, 1:] >= 0
    logp = logits[:, :-1] - logits[:, :-1].exp().sum(-1, keepdim=True).log()
    return -logp.gather(-1, labels[:, 1:].clamp_min(0)[..., None])[..., 0] * spots, spots
