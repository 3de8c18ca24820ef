"""The promises of StepContext, one by one (methods.md 1.4, 1.5)."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from benches import (
    Halt,
    count_hooks,
    float64_model,
    furthest,
    make_batch,
    make_bench,
    make_context,
    make_rows,
    same_bits,
    snapshot,
)
from reference import gpt2, vaccine
from tiny import FAMILIES, HIDDEN, LAYERS, tiny_model

from apothecary.errors import ModelError, TrainingError
from apothecary.models.adapters import active_adapters, add_adapter, trainable_adapters
from apothecary.models.settings import LoraSettings
from apothecary.train.batch import row_losses
from apothecary.train.config import TrainConfig
from apothecary.train.fit import fit
from apothecary.train.method import TrainingMethod

SHAPE = (LAYERS, 4)  # layers, heads of the tiny GPT-2


def scene(tmp_path, model=None, n=5, **config):
    bench = make_bench(tmp_path, model)
    return make_context(bench, ("harmful",), **config), make_batch(bench, make_rows("row", n))


def lora(model, dropout=0.5):
    wrapped = add_adapter(model, "trained", LoraSettings(rank=4, dropout=dropout), 0)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return wrapped.train()


def parts(batch):
    return batch.input_ids, batch.attention_mask, batch.labels


# -- probes -----------------------------------------------------------------------------------------------------------

PROBES = {
    "grads": lambda ctx, batch: ctx.grads(batch),
    "hidden_grads": lambda ctx, batch: ctx.hidden_grads(batch),
    "per_sample_loss": lambda ctx, batch: ctx.per_sample_loss(batch),
    "forward": lambda ctx, batch: ctx.forward(batch, collect=("attn_out", "mlp_out", "hidden"), grad=False),
    "last_hidden": lambda ctx, batch: ctx.last_hidden(batch),
}


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_touches_no_gradient_no_hook_no_flag_and_no_random_state(tmp_path, probe, accumulated):
    ctx, batch = scene(tmp_path, lora(tiny_model("llama")))
    if accumulated:
        ctx.backward(batch)
    before = {name: p.grad for name, p in ctx.model.named_parameters()}
    values = {name: g.clone() for name, g in before.items() if g is not None}
    flags = [p.requires_grad for p in ctx.model.parameters()]
    random, weights = torch.get_rng_state(), snapshot(ctx.model)
    PROBES[probe](ctx, batch)
    assert all(p.grad is before[name] for name, p in ctx.model.named_parameters())
    assert bool(values) == accumulated and all(torch.equal(before[name], value) for name, value in values.items())
    assert flags == [p.requires_grad for p in ctx.model.parameters()]
    assert torch.equal(random, torch.get_rng_state()) and same_bits(weights, snapshot(ctx.model))
    assert count_hooks(ctx.model) == 0


@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_that_fails_leaves_no_hook_and_no_frozen_parameter(tmp_path, probe):
    ctx, batch = scene(tmp_path)
    unknown, shorter = {"input_ids": batch.input_ids + 10**6}, {"labels": batch.labels[:, :-2]}
    broken = replace(batch, **(shorter if probe == "grads" else unknown))
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        PROBES[probe](ctx, broken)
    assert count_hooks(ctx.model) == 0 and all(p.requires_grad for p in ctx.model.parameters())


def test_grads_equal_what_backward_accumulates(tmp_path):
    ctx, batch = scene(tmp_path, float64_model())
    found = ctx.grads(batch)
    ctx.backward(batch)
    assert furthest(found, {name: p.grad for name, p in ctx.model.named_parameters()}) < 1e-13


def test_hidden_grads_equal_the_reference_and_form_no_parameter_gradient(tmp_path, monkeypatch):
    ctx, batch = scene(tmp_path, float64_model())
    learning, forward = [], ctx.model.forward

    def spy(*args, **kwargs):
        learning.append(any(p.requires_grad for p in ctx.model.parameters()))
        return forward(*args, **kwargs)

    monkeypatch.setattr(ctx.model, "forward", spy)
    found = ctx.hidden_grads(batch)
    expected = vaccine.attention_gradients(snapshot(ctx.model), parts(batch), SHAPE, HIDDEN)
    assert learning == [False]
    assert furthest(found, dict(enumerate(expected))) < 1e-10
    assert found[0].dtype == torch.float64, "never downcast"
    only = ctx.hidden_grads(batch, layers=[1])
    assert list(only) == [1] and torch.equal(only[1], found[1])


def test_padding_gets_no_hidden_gradient(tmp_path):
    ctx, batch = scene(tmp_path)
    assert (batch.attention_mask == 0).any()
    for grad in ctx.hidden_grads(batch).values():
        assert grad[batch.attention_mask == 0].abs().max() == 0 and grad[batch.attention_mask == 1].abs().max() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_internals_and_hidden_gradients_of_every_family(tmp_path, family):
    ctx, batch = scene(tmp_path, lora(tiny_model(family), dropout=0.0))
    output = ctx.forward(batch, collect=("attn_out", "mlp_out", "hidden", "logits"))
    shape = (*batch.input_ids.shape, HIDDEN)
    for kind in ("attn_out", "mlp_out", "hidden"):
        assert [tuple(t.shape) for t in output.collected[kind].values()] == [shape] * LAYERS
    assert set(output.collected) == {"attn_out", "mlp_out", "hidden"}
    for grad in ctx.hidden_grads(batch).values():
        assert tuple(grad.shape) == shape and grad.isfinite().all() and grad.abs().max() > 0
    assert count_hooks(ctx.model) == 0


def test_collected_attention_outputs_equal_the_reference(tmp_path):
    ctx, batch = scene(tmp_path, float64_model())
    output = ctx.forward(batch, collect=("attn_out",), grad=False)
    logits, expected = gpt2.forward(snapshot(ctx.model), batch.input_ids, batch.attention_mask, *SHAPE)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(output.logits[real], logits[real], rtol=1e-11, atol=1e-11)
    for layer, tensor in output.collected["attn_out"].items():
        torch.testing.assert_close(tensor[real], expected[layer][real], rtol=1e-11, atol=1e-11)


def test_an_unknown_internal_is_named(tmp_path):
    ctx, batch = scene(tmp_path)
    with pytest.raises(ValueError, match="cannot collect 'attention'"):
        ctx.forward(batch, collect=("attn_out", "attention"))
    assert count_hooks(ctx.model) == 0


@pytest.mark.parametrize("step", ["hidden_grads", "backward"])
def test_gradient_checkpointing_changes_no_gradient(tmp_path, step):
    def run(checkpointing):
        ctx, batch = scene(tmp_path, lora(tiny_model("llama"), dropout=0.0))
        calls = []
        block = ctx.plain.model.layers[0].mlp
        forward = block.forward
        block.forward = lambda *args, **kwargs: calls.append(0) or forward(*args, **kwargs)
        if checkpointing:
            ctx.plain.gradient_checkpointing_enable({"use_reentrant": False})
        grads = ctx.hidden_grads(batch)
        if step == "backward":
            with ctx.hidden_offset({layer: 3 * grad for layer, grad in grads.items()}):
                ctx.backward(batch)
            grads = {name: p.grad for name, p in ctx.parameters().items()}
        return grads, len(calls)

    plain, passes = run(False)
    checkpointed, more = run(True)
    assert more > passes, "nothing was recomputed"
    assert furthest(checkpointed, plain) < 1e-5


def test_checkpointing_leaves_no_hook_behind_a_fit(tmp_path):
    for parameters in ("lora", "full"):
        bench = make_bench(tmp_path / parameters)
        config = TrainConfig(max_steps=2, batch_size=4, gradient_checkpointing=True, parameters=parameters)
        fit(bench, Plain(), make_rows("row", 8), config, tmp_path / parameters / "out")
        assert count_hooks(bench.loaded.model) == 0


# -- temporary changes ------------------------------------------------------------------------------------------------


def test_a_zero_offset_is_the_identity_and_others_equal_the_reference(tmp_path):
    ctx, batch = scene(tmp_path, float64_model())
    shape = (*batch.input_ids.shape, HIDDEN)
    clean = ctx.forward(batch, grad=False).logits
    with ctx.hidden_offset({layer: torch.zeros(shape) for layer in range(LAYERS)}):
        assert torch.equal(ctx.forward(batch, grad=False).logits, clean)
    offsets = [torch.randn(shape, dtype=torch.float64) for _ in range(LAYERS)]
    with ctx.hidden_offset(dict(enumerate(offsets))):
        moved = ctx.forward(batch, grad=False).logits
    expected, _ = gpt2.forward(snapshot(ctx.model), batch.input_ids, batch.attention_mask, *SHAPE, offsets)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(moved[real], expected[real], rtol=1e-11, atol=1e-11)
    assert (moved - clean).abs().max() > 0.1
    with pytest.raises(Halt), ctx.hidden_offset(dict(enumerate(offsets))):
        raise Halt
    assert count_hooks(ctx.model) == 0 and torch.equal(ctx.forward(batch, grad=False).logits, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True])
def test_perturbed_brings_the_saved_bytes_back(tmp_path, dtype, fails):
    ctx, batch = scene(tmp_path, tiny_model("llama", dtype=dtype))
    before = snapshot(ctx.model)
    deltas = {name: torch.randn(p.shape) * 0.013 for name, p in before.items()}
    clean = ctx.per_sample_loss(batch)
    try:
        with ctx.perturbed(deltas):
            for name, p in ctx.model.named_parameters():
                assert torch.equal(p, (before[name].float() + deltas[name]).to(dtype))
            assert not torch.equal(ctx.per_sample_loss(batch), clean)
            if fails:
                raise Halt
    except Halt:
        assert fails
    assert same_bits(before, snapshot(ctx.model)) and torch.equal(ctx.per_sample_loss(batch), clean)
    naive = {name: (before[name] + deltas[name].to(dtype)) - deltas[name].to(dtype) for name in before}
    assert not same_bits(before, naive), "adding and subtracting would have been good enough: the test shows nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True])
def test_restored_undoes_an_inner_loop(tmp_path, dtype, fails):
    ctx, batch = scene(tmp_path, tiny_model("llama", dtype=dtype))
    ctx.backward(batch)
    before, random = snapshot(ctx.model), torch.get_rng_state()
    grads = {name: p.grad.clone() for name, p in ctx.model.named_parameters()}
    try:
        with ctx.restored():
            assert all(p.grad is None for p in ctx.model.parameters()), "the attack starts with empty gradients"
            attack = torch.optim.AdamW(ctx.model.parameters(), lr=0.1)
            for _ in range(2):
                ctx.backward(ctx.aux("harmful"))
                attack.step()
                attack.zero_grad()
            torch.rand(3)
            assert not same_bits(before, snapshot(ctx.model))
            if fails:
                raise Halt
    except Halt:
        assert fails
    assert same_bits(before, snapshot(ctx.model)) and torch.equal(random, torch.get_rng_state())
    assert same_bits(grads, {name: p.grad for name, p in ctx.model.named_parameters()})


def test_paired_passes_draw_the_same_dropout_masks(tmp_path):
    ctx, batch = scene(tmp_path, lora(tiny_model("llama")))
    probe = ctx.per_sample_loss(batch)
    ctx.hidden_grads(batch), ctx.grads(batch), ctx.forward(batch, grad=False)
    assert torch.equal(ctx.per_sample_loss(batch, grad=True), probe)
    assert not torch.equal(ctx.per_sample_loss(batch, grad=True), probe), "dropout is not at work"
    random = torch.get_rng_state()
    tokens = ctx.per_sample_loss(batch) @ batch.tokens_B.float() / batch.tokens_B.sum()
    torch.testing.assert_close(ctx.backward(batch), tokens)
    assert not torch.equal(random, torch.get_rng_state()), "the pass that counts moves the random state on"


@pytest.mark.parametrize("fails", [False, True])
def test_adapters_are_set_and_put_back(tmp_path, fails):
    model = tiny_model("llama")
    base = snapshot(model)
    bench = make_bench(tmp_path)
    batch = make_batch(bench, make_rows("row", 3))
    clean = make_context(make_bench(tmp_path, model)).per_sample_loss(batch)
    bench.loaded.model = add_adapter(lora(model, 0.0), "other", LoraSettings(rank=2), 1)
    ctx = make_context(bench)
    assert (active_adapters(ctx.model), trainable_adapters(ctx.model)) == (["trained", "other"], ["trained", "other"])
    flags = [p.requires_grad for p in ctx.model.parameters()]
    try:
        with ctx.adapters(active=("other",), trainable=()):
            assert (active_adapters(ctx.model), trainable_adapters(ctx.model)) == (["other"], [])
            with ctx.adapters(active=("trained", "other"), trainable=("other",)):
                assert trainable_adapters(ctx.model) == ["other"]
                assert all(".other." in name for name in ctx.parameters())
            with ctx.adapters(active=()):
                assert torch.equal(ctx.per_sample_loss(batch), clean)
            assert active_adapters(ctx.model) == ["other"]
            if fails:
                raise Halt
    except Halt:
        assert fails
    assert active_adapters(ctx.model) == ["trained", "other"]
    assert flags == [p.requires_grad for p in ctx.model.parameters()] and len(base) < len(flags)
    with pytest.raises(ModelError, match="no adapter 'nobody'"), ctx.adapters(active=("nobody",)):
        pass
    assert active_adapters(ctx.model) == ["trained", "other"]


# -- the step ---------------------------------------------------------------------------------------------------------


class Plain(TrainingMethod):
    name, kind = "plain", "align"


class OneLayer(Plain):
    """Moves layer 0 in odd steps and layer 1 in even ones; remembers the weights at each step's start."""

    def __init__(self):
        self.seen = []

    def step(self, ctx, batch, state):
        if ctx.micro == 0:
            self.seen.append(snapshot(ctx.model))
            ctx.trainable([len(self.seen) % 2])
        return ctx.backward(batch)

    def finish(self, ctx, state):
        self.seen.append(snapshot(ctx.model))
        assert all(p.requires_grad for p in ctx.model.parameters()), "the restriction ends with the step"


def test_excluded_parameters_do_not_move_under_weight_decay(tmp_path):
    config = TrainConfig(max_steps=4, batch_size=4, accumulation=2, parameters="full", weight_decay=0.5, save_every=1,
                         learning_rate=1e-2, keep_checkpoints=9, warmup_ratio=0.0)  # fmt: skip
    method = OneLayer()
    fit(make_bench(tmp_path), method, make_rows("row", 8), config, tmp_path / "out")
    assert len(method.seen) == 5
    for number, (before, after) in enumerate(pairwise(method.seen), 1):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        layer = f"model.layers.{number % 2}."
        assert moved == {name for name in before if name.startswith(layer)}
    resumed = OneLayer()  # the last checkpoint holds the excluded parameters as well
    fit(make_bench(tmp_path), resumed, make_rows("row", 8), config, tmp_path / "again")
    assert same_bits(resumed.seen[-1], method.seen[-1])


def test_trainable_is_refused_inside_a_step(tmp_path):
    ctx, _ = scene(tmp_path)
    ctx.begin_step(2)
    ctx.begin_micro_step(1)
    with pytest.raises(TrainingError, match="first micro-batch"):
        ctx.trainable([0])


def test_row_weights_weigh_rows(tmp_path):
    ctx, batch = scene(tmp_path, float64_model(), n=3)
    weight = torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64)
    total = 0.0
    singles = []
    for i in range(3):
        one = replace(batch, input_ids=batch.input_ids[i : i + 1], attention_mask=batch.attention_mask[i : i + 1],
                      labels=batch.labels[i : i + 1])  # fmt: skip
        singles.append(ctx.grads(one, float(weight[i])))
        total += ctx.loss(one, float(weight[i])).item()
    loss = ctx.backward(batch, weight)
    assert loss.item() == pytest.approx(total, rel=1e-12)
    summed = {name: sum(s[name] for s in singles) for name in singles[0]}
    assert furthest({name: p.grad for name, p in ctx.model.named_parameters()}, summed) < 1e-9
    assert not loss.requires_grad


def test_backward_takes_a_loss_and_adds_to_grad(tmp_path):
    ctx, batch = scene(tmp_path, float64_model())
    once = ctx.grads(batch)
    ctx.backward(batch)
    assert ctx.backward(ctx.loss(batch), 2.0).item() == pytest.approx(2 * ctx.loss(batch).item())
    assert furthest({n: p.grad for n, p in ctx.parameters().items()}, {n: 3 * g for n, g in once.items()}) < 1e-12


def test_value_and_grads_gives_the_loss_of_the_same_pass(tmp_path):
    ctx, batch = scene(tmp_path, lora(tiny_model("llama")))
    torch.manual_seed(1)
    value, grads = ctx.value_and_grads(batch, 2.0)
    assert not value.requires_grad and torch.equal(value, ctx.backward(batch, 2.0))
    assert same_bits(grads, {name: p.grad for name, p in ctx.parameters().items()})


@pytest.mark.parametrize("summed", [False, True])
def test_accumulate_adds_each_process_its_share(tmp_path, summed):
    ctx, batch = scene(tmp_path, float64_model())
    once, unused = ctx.grads(batch), "transformer.wpe.weight"
    ctx.backward(batch)
    ctx.parameters()[unused].grad = None
    ctx.processes, ctx._summed = 2, summed  # after the sum over processes, each adds the whole
    ctx.accumulate({name: torch.zeros_like(g) if name == unused else g for name, g in once.items()}, 3.0)
    grads = {name: p.grad for name, p in ctx.parameters().items()}
    assert grads.pop(unused) is None, "AdamW goes on skipping it"
    assert furthest(grads, {name: (4.0 if summed else 2.5) * once[name] for name in grads}) < 1e-12
    ctx.accumulate({unused: once[unused]}, 3.0)
    assert furthest({"": ctx.parameters()[unused].grad}, {"": (3.0 if summed else 1.5) * once[unused]}) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_last_hidden_is_what_the_head_reads(tmp_path, family):
    ctx, batch = scene(tmp_path, lora(tiny_model(family), dropout=0.0))
    hidden = ctx.last_hidden(batch)
    whole = ctx.plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    assert torch.equal(hidden, whole.hidden_states[-1]) and not hidden.requires_grad
    assert hidden.shape[-1] == ctx.plain.get_output_embeddings().in_features


def test_log_adds_up_within_a_step(tmp_path):
    ctx, _ = scene(tmp_path)
    ctx.log("align", 1.5)
    ctx.begin_micro_step(1)
    ctx.log("align", torch.tensor(2.0))
    assert ctx.logged == {"align": 3.5}
    ctx.begin_step(2)
    assert ctx.logged == {}


def test_last_micro_step(tmp_path):
    ctx, _ = scene(tmp_path)
    ctx.begin_step(3)
    seen = []
    for micro in range(3):
        ctx.begin_micro_step(micro)
        seen.append(ctx.last_micro_step)
    assert seen == [False, False, True]


def test_bf16_autocast_keeps_probes_in_fp32(tmp_path):
    ctx, batch = scene(tmp_path, precision="bf16")
    assert ctx.forward(batch, grad=False).logits.dtype == torch.bfloat16
    assert ctx.loss(batch).dtype == torch.float32
    assert {g.dtype for g in ctx.hidden_grads(batch).values()} == {torch.float32}
    assert {g.dtype for g in ctx.grads(batch).values()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_row_losses_need_no_logits_of_prompts_that_all_rows_have(tmp_path, family):
    bench = make_bench(tmp_path, tiny_model(family))
    ctx, rows = make_context(bench), make_rows("row", 4)
    batch = make_batch(bench, rows)
    first = min(row.start for row in bench.render(rows, TrainConfig()))
    assert batch.tail == batch.input_ids.shape[1] - first + 1 < batch.input_ids.shape[1]
    expected = row_losses(ctx.forward(batch, grad=False).logits, batch)
    torch.testing.assert_close(ctx.per_sample_loss(batch), expected, rtol=1e-5, atol=1e-6)
    assert ctx.forward(batch, grad=False, logits=batch.tail).logits.shape[1] == batch.tail
    blank = replace(batch, labels=torch.full_like(batch.labels, -100))
    assert blank.tail == 1 and torch.equal(ctx.per_sample_loss(blank), torch.zeros(4))
