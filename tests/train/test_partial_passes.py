"""Passes that leave out what the mathematics does not need: layers run once, adapters inside the weights."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from benches import (
    Halt,
    count_hooks,
    furthest,
    make_batch,
    make_bench,
    make_context,
    make_rows,
    same_bits,
    snapshot,
    working_lora,
)
from tiny import FAMILIES, tiny_model
from torch import nn

from apothecary.data.chat import IGNORE
from apothecary.errors import ConfigError, TrainingError
from apothecary.models.adapters import active_adapters, add_adapter, trainable_adapters
from apothecary.models.anatomy import attention_blocks, decoder_layers
from apothecary.models.settings import LoraSettings
from apothecary.train import internals

DEEP = 4


def deep_model(family="llama", dtype=torch.float32, **overrides):
    depth = "n_layer" if family == "gpt2" else "num_hidden_layers"
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2} if family == "gemma3" else {}
    return tiny_model(family, 0, dtype, **{depth: DEEP}, **kinds, **overrides)


def scene(tmp_path, model, **config):
    bench = make_bench(tmp_path, model)
    ctx = make_context(bench, ("harmful",), **config)
    return ctx, make_batch(bench, make_rows("row", 4))


def two_passes(ctx, batch, layers, reuse):
    """(loss, gradients, random state) of a probe and a pass with offsets along it, as Vaccine's kin make them."""
    ctx.model.zero_grad()
    torch.manual_seed(1)
    with ctx.reusing(min(layers)) if reuse else nullcontext():
        grads = ctx.hidden_grads(batch, layers)
        with ctx.hidden_offset({layer: 3 * grad for layer, grad in grads.items()}):
            loss = ctx.backward(batch)
    return loss, {name: p.grad for name, p in ctx.parameters().items()}, torch.get_rng_state()


def traces(model):
    """Hooks and own `forward` functions, which must not stay."""
    return count_hooks(model), [name for name, module in model.named_modules() if "forward" in vars(module)]


# -- layers that run once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_reusing_changes_no_bit_under_dropout(tmp_path, family, checkpointing):
    ctx, batch = scene(tmp_path, working_lora(deep_model(family), dropout=0.5))
    if checkpointing:
        ctx.plain.gradient_checkpointing_enable({"use_reentrant": False})
        ctx.plain.disable_input_require_grads()
    ctx.trainable([2, 3])
    plain, reused = (two_passes(ctx, batch, [2, 3], reuse) for reuse in (False, True))
    assert torch.equal(reused[0], plain[0]) and same_bits(reused[1], plain[1]) and torch.equal(reused[2], plain[2])
    assert len(reused[1]) > 0 and all(g.abs().max() > 0 for g in reused[1].values())
    assert traces(ctx.model) == (0, [])
    assert not torch.equal(two_passes(ctx, batch, [1, 3], True)[0], plain[0]), "the choice of layers matters"


@pytest.mark.parametrize("config", [{"parameters": "full"}, {"parameters": "full", "precision": "bf16"}])
@pytest.mark.parametrize("lowest", [0, 1, 3])
def test_reusing_changes_no_bit_with_full_parameters(tmp_path, lowest, config):
    model = deep_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3).train()
    ctx, batch = scene(tmp_path, model, **config)
    ctx.trainable([lowest, 3])
    plain, reused = (two_passes(ctx, batch, [lowest, 3], reuse) for reuse in (False, True))
    assert torch.equal(reused[0], plain[0]) and same_bits(reused[1], plain[1]) and torch.equal(reused[2], plain[2])


def test_layers_below_run_once_and_without_a_graph(tmp_path, monkeypatch):
    ctx, batch = scene(tmp_path, working_lora(deep_model()))
    seen = []
    for index, (_, layer) in enumerate(decoder_layers(ctx.model)):

        def spy(*args, index=index, forward=layer.mlp.forward, **kwargs):
            output = forward(*args, **kwargs)
            seen.append((index, output.requires_grad))
            return output

        monkeypatch.setattr(layer.mlp, "forward", spy)
    two_passes(ctx, batch, [2, 3], reuse=True)
    assert seen == [(0, False), (1, False), (2, True), (3, True), (2, True), (3, True)]


def test_an_error_leaves_no_trace_of_reusing(tmp_path):
    ctx, batch = scene(tmp_path, deep_model())
    clean = ctx.forward(batch, grad=False).logits
    with pytest.raises(Halt), ctx.reusing(2):
        ctx.forward(batch, grad=False)
        raise Halt
    assert traces(ctx.model) == (0, [])
    other = replace(batch, input_ids=batch.input_ids.flip(0), attention_mask=batch.attention_mask.flip(0))
    assert torch.equal(ctx.forward(batch, grad=False).logits, clean)
    assert not torch.equal(ctx.forward(other, grad=False).logits, clean)


def test_reusing_keeps_a_forward_that_a_module_had_of_its_own(tmp_path):
    """As accelerate's dispatch over several devices sets it."""
    ctx, batch = scene(tmp_path, deep_model())
    layer = decoder_layers(ctx.model)[0][1]
    calls, forward = [], layer.forward

    def own(*args, **kwargs):
        calls.append(0)
        return forward(*args, **kwargs)

    layer.forward = own
    two_passes(ctx, batch, [1, 2], reuse=True)
    assert calls == [0] and layer.forward is own


def test_what_is_reused_can_be_neither_probed_nor_offset(tmp_path):
    ctx, batch = scene(tmp_path, deep_model())
    with ctx.reusing(2):
        for layers in ([1, 3], None):
            with pytest.raises(TrainingError, match="is not run anew while those below 2 are reused"):
                ctx.hidden_grads(batch, layers)
        with pytest.raises(TrainingError, match="layer 0"), ctx.hidden_offset({0: torch.zeros(1)}):
            pass
    assert len(ctx.hidden_grads(batch)) == DEEP


# -- the head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probes_head_reads_from_the_first_response_on(tmp_path, family):
    ctx, batch = scene(tmp_path, deep_model(family))
    seen, forward = [], ctx.forward
    ctx.forward = lambda *args, **kwargs: seen.append(forward(*args, **kwargs)) or seen[-1]
    found = ctx.hidden_grads(batch)
    first = min(int((row != IGNORE).nonzero()[0]) for row in batch.labels)
    assert seen[0].logits.shape[1] == batch.labels.shape[1] - first + 1 < batch.labels.shape[1]
    with internals.probe_zeros(attention_blocks(ctx.model)) as zeros:
        whole = torch.autograd.grad(ctx.loss(batch), list(zeros.values()))
    assert furthest(found, dict(enumerate(whole))) < 1e-4
    empty = replace(batch, labels=torch.full_like(batch.labels, IGNORE))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in ctx.hidden_grads(empty).values())


# -- adapters inside the weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_pass_is_the_same_function(tmp_path, family):
    ctx, batch = scene(tmp_path, working_lora(deep_model(family)))
    ctx.backward(batch)
    before, flags = snapshot(ctx.model), [p.requires_grad for p in ctx.model.parameters()]
    grads = {name: p.grad for name, p in ctx.parameters().items()}
    branch = ctx.hidden_grads(batch)
    with ctx.merged():
        assert active_adapters(ctx.model) == []
        merged = ctx.hidden_grads(batch)
    assert furthest(merged, branch) < 1e-4
    with ctx.adapters(active=()):
        assert furthest(ctx.hidden_grads(batch), branch) > 1e-2, "the adapter does nothing"
    assert same_bits(before, snapshot(ctx.model)) and flags == [p.requires_grad for p in ctx.model.parameters()]
    assert (active_adapters(ctx.model), trainable_adapters(ctx.model)) == (["trained"], ["trained"])
    assert all(p.grad is grads[name] for name, p in ctx.parameters().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_adapters_are_merged_and_taken_out_to_the_bit_after_an_error(tmp_path, dtype):
    model = add_adapter(working_lora(deep_model(dtype=dtype)), "other", LoraSettings(rank=2), 1)
    ctx, _ = scene(tmp_path, model)
    before, name = snapshot(ctx.model), "base_model.model.model.layers.1.mlp.up_proj"
    layer = ctx.model.get_submodule(name)
    delta = sum(layer.get_delta_weight(adapter) for adapter in ("trained", "other")).detach()
    with pytest.raises(Halt), ctx.merged():
        expected = (before[f"{name}.base_layer.weight"].float() + delta).to(dtype)
        assert torch.equal(layer.base_layer.weight, expected)
        raise Halt
    assert same_bits(before, snapshot(ctx.model)) and active_adapters(ctx.model) == ["trained", "other"]


@pytest.mark.parametrize(("targets", "dropout", "problem"), [
    ("all-linear", 0.1, "has dropout"), (("embed_tokens",), 0.0, "lies on an embedding"),
    (("lm_head",), 0.0, "lies on an embedding"),
])  # fmt: skip
def test_an_adapter_that_no_weight_stands_for_is_refused(tmp_path, targets, dropout, problem):
    ctx, _ = scene(tmp_path, working_lora(deep_model(), dropout, targets))
    with pytest.raises(ConfigError, match=problem), ctx.merged():
        pass
    assert active_adapters(ctx.model) == ["trained"]


def test_quantised_weights_and_other_kinds_of_lora_are_refused(tmp_path):
    ctx, _ = scene(tmp_path, working_lora(deep_model()))
    layer = ctx.plain.model.layers[0].mlp.up_proj
    layer.lora_variant["trained"] = object()
    with pytest.raises(ConfigError, match="is not plain LoRA"), ctx.merged():
        pass
    del layer.lora_variant["trained"]
    layer.base_layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match="lies on quantised weights"), ctx.merged():
        pass
