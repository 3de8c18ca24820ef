"""Losses through the head, chunk by chunk, and passes of several batches in one."""

from __future__ import annotations

import pytest
import torch
from benches import float64_model, furthest, make_batch, make_bench, make_context, make_rows
from tiny import HIDDEN, LAYERS, VOCAB

from apothecary.data.chat import Rendered
from apothecary.models.adapters import add_adapter
from apothecary.models.anatomy import logit_head
from apothecary.models.settings import LoraSettings
from apothecary.train import context, heads
from apothecary.train.batch import batch_loss, collate
from apothecary.train.heads import head_loss


def scene(tmp_path, parameters="full", rows=4, **config):
    model = float64_model()
    if parameters == "lora":
        model = add_adapter(model, "trained", LoraSettings(targets=("c_attn", "lm_head")), 0).double()
    bench = make_bench(tmp_path, model)
    return make_context(bench, parameters=parameters, **config), make_batch(bench, make_rows("row", rows))


def gradients(ctx, loss):
    parameters = ctx.parameters()
    found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g.abs().max() > 1e-12}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # an adapter on a tied head is what is tested
@pytest.mark.parametrize("reduction", ["token_mean", "sample_mean"])
@pytest.mark.parametrize("parameters", ["full", "lora"])
@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_value_and_gradient_equal_plain_autograd_over_all_logits(tmp_path, monkeypatch, chunk, parameters, reduction):
    ctx, batch = scene(tmp_path, parameters, reduction=reduction)
    monkeypatch.setattr(heads, "CHUNK", chunk)
    head, states = logit_head(ctx.model), ctx.forward(batch, ("embedded", "hidden")).states
    assert len(states) == LAYERS + 1
    expected = sum(batch_loss(head(state), batch, reduction) for state in states) / len(states)
    found = head_loss(ctx, head, states, batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert found.item() != pytest.approx(ctx.loss(batch, grad=False).item(), rel=1e-3)
    wanted = gradients(ctx, expected.log1p())
    got = gradients(ctx, head_loss(ctx, head, ctx.forward(batch, ("embedded", "hidden")).states, batch).log1p())
    assert furthest(got, wanted) < 1e-9


def test_no_more_logits_than_a_chunk_exist_and_only_response_tokens_meet_the_head(tmp_path, monkeypatch):
    ctx, batch = scene(tmp_path)
    monkeypatch.setattr(heads, "CHUNK", 6)
    head, states = logit_head(ctx.model), ctx.forward(batch, ("embedded", "hidden"), logits=False).states
    sizes = []
    handle = ctx.model.lm_head.register_forward_hook(lambda _m, _i, out: sizes.append(out.numel() // VOCAB))
    head_loss(ctx, head, states, batch).backward()
    handle.remove()
    assert max(sizes) <= 6 and sum(sizes) == len(states) * int((batch.labels >= 0).sum()), "none computed twice"


def test_without_supervised_tokens_the_loss_is_zero_and_so_are_gradients(tmp_path):
    ctx, _ = scene(tmp_path)
    empty = collate([], 0, 7.0, blank=Rendered("blank", (5, 6, 7), 1))
    loss = head_loss(ctx, logit_head(ctx.model), ctx.forward(empty, ("hidden", "embedded")).states, empty)
    ctx.backward(loss)
    assert loss.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in ctx.parameters().values() if p.grad is not None)


@pytest.mark.parametrize("padding", [0.0, 9.0])
def test_a_common_pass_equals_separate_ones(tmp_path, monkeypatch, padding):
    ctx, first = scene(tmp_path)
    second = make_batch(make_bench(tmp_path), make_rows("a longer row", 3))
    monkeypatch.setattr(context, "PADDING", padding)
    passes = []
    handle = ctx.model.register_forward_hook(lambda *_: passes.append(0))
    outputs = ctx.forward_each([first, second], ("mlp_out", "hidden", "embedded"), grad=False)
    handle.remove()
    assert len(passes) == (1 if padding else 2)
    for batch, output in zip((first, second), outputs, strict=True):
        alone, real = ctx.forward(batch, ("mlp_out", "hidden", "embedded"), grad=False), batch.attention_mask.bool()
        assert output.states[0].shape == (*batch.input_ids.shape, HIDDEN)
        torch.testing.assert_close(output.logits[real], alone.logits[real], rtol=1e-9, atol=1e-9)
        for name, layers in alone.collected.items():
            for layer, tensor in layers.items():
                torch.testing.assert_close(output.collected[name][layer][real], tensor[real], rtol=1e-9, atol=1e-9)


def test_without_logits_the_head_reads_the_last_token_alone(tmp_path):
    ctx, batch = scene(tmp_path)
    assert ctx.forward(batch, grad=False, logits=False).logits.shape == (4, 1, VOCAB)
