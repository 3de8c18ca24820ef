"""The simulated attack: Hessian-vector products and the chain rule through the step, against plain autograd."""

from __future__ import annotations

import pytest
import torch
from benches import float64_model, furthest, make_batch, make_bench, make_context, make_rows, same_bits, snapshot
from tiny import FAMILIES, tiny_model

from apothecary.errors import TrainingError
from apothecary.models.adapters import add_adapter
from apothecary.models.settings import LoraSettings
from apothecary.train.internals import double_backward
from apothecary.train.scores import combine, scaled
from apothecary.train.simulated_attack import post_attack_gradient, whole_set


def random_direction(ctx, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in ctx.parameters().items()}


def lora(model):
    """An adapter whose B is not zero, so that A has a part in the Hessian."""
    model = add_adapter(model, "trained", LoraSettings(rank=2), 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    return model


def slopes_of_gradient(ctx, batch, vector, step):
    """H v by differences of gradients."""
    found = []
    for sign in (1, -1):
        with ctx.perturbed(scaled(vector, sign * step)):
            found.append(ctx.grads(batch))
    return scaled(combine(*found, -1.0), 1 / (2 * step))


@pytest.mark.parametrize("adapt", [lambda model: model, lambda model: lora(model).double()])
def test_the_hessian_vector_product_is_the_slope_of_the_gradient(tmp_path, adapt):
    bench = make_bench(tmp_path, adapt(float64_model()))
    ctx, batch = make_context(bench), make_batch(bench, make_rows("harm", 3))
    vector, before = random_direction(ctx), snapshot(ctx.model)
    found = ctx.hessian_vector(batch, vector)
    assert furthest(found, slopes_of_gradient(ctx, batch, vector, 1e-5)) < 1e-6
    assert same_bits(before, snapshot(ctx.model)) and all(p.grad is None for p in ctx.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_attention_gives_way_to_what_can_be_differentiated_twice(tmp_path, family):
    products = []
    for attention in ({}, {"attn_implementation": "eager"}):
        bench = make_bench(tmp_path, lora(tiny_model(family, **attention)))
        ctx, batch = make_context(bench), make_batch(bench, make_rows("harm", 3))
        products.append(ctx.hessian_vector(batch, random_direction(ctx)))
    flat, wanted = (torch.cat([t.flatten() for t in each.values()]) for each in products)
    assert (flat - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.evidence("curate/pharmacist", "finite_difference")
@pytest.mark.parametrize("normalise", [False, True])
def test_the_exact_gradient_goes_through_the_step(tmp_path, normalise):
    """d/d theta of f(theta - alpha grad h), by differences along a random direction."""
    bench = make_bench(tmp_path, float64_model())
    ctx = make_context(bench)
    harmful, validation = (make_batch(bench, make_rows(tag, 4)) for tag in ("harm", "val"))
    vector, values = random_direction(ctx), []
    for sign in (1, -1):
        with ctx.perturbed(scaled(vector, sign * 1e-6)):
            attack = ctx.grads(harmful)
            norm = torch.cat([g.flatten() for g in attack.values()]).norm() if normalise else 1.0
            with ctx.perturbed(scaled(attack, -0.3 / norm)):
                values.append(ctx.loss(validation, grad=False).item())
    expected = (values[0] - values[1]) / 2e-6
    found = [sum((g * vector[name]).sum() for name, g in
                 post_attack_gradient(ctx, [harmful], [validation], 0.3, normalise, exact).items()).item()
             for exact in (True, False)]  # fmt: skip
    assert found[0] == pytest.approx(expected, rel=1e-5)
    assert found[1] != pytest.approx(expected, rel=1e-2), "the second order matters here"


def test_a_whole_set_in_parts_has_the_gradient_of_the_whole(tmp_path):
    bench = make_bench(tmp_path, float64_model(), aux={"harmful": make_rows("harm", 70)})
    ctx = make_context(bench)
    parts = whole_set(bench, ctx, "harmful")
    assert [len(part.row_ids) for part in parts] == [32, 32, 6]
    whole = ctx.grads(make_batch(bench, bench.aux["harmful"]))
    found = post_attack_gradient(ctx, parts, parts, 0.0)
    assert furthest(found, whole) < 1e-12


def test_attention_without_second_derivative_is_refused(tmp_path):
    bench = make_bench(tmp_path)
    ctx, batch = make_context(bench), make_batch(bench, make_rows("harm", 3))
    bench.loaded.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(TrainingError, match="'flash_attention_2' has no second derivative; load the model with"):
        ctx.hessian_vector(batch, random_direction(ctx))


def test_an_operation_without_second_derivative_is_told_in_one_sentence():
    model = tiny_model("llama")
    message = r"LlamaForCausalLM has no second derivative .*; choose a method without Hessian"
    with pytest.raises(TrainingError, match=message), double_backward(model):
        raise RuntimeError("derivative for aten::_fused_backward is not implemented")
    with pytest.raises(RuntimeError, match="something else"), double_backward(model):
        raise RuntimeError("something else")
