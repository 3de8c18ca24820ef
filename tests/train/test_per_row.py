"""Per-row gradients from one backward, and their projection, against one backward per row."""

from __future__ import annotations

import pytest
import torch
from benches import count_hooks, make_batch, make_bench, make_context, make_rows, same_bits, snapshot
from tiny import FAMILIES, tiny_model

from apothecary.errors import TrainingError
from apothecary.models.adapters import add_adapter
from apothecary.models.settings import LoraSettings
from apothecary.train import per_row
from apothecary.train.per_row import SIGNS, projected, row_gradients


def scene(tmp_path, family="llama", targets="all-linear", dtype=torch.float64):
    """A context over a LoRA adapter whose B is not zero."""
    bench = make_bench(tmp_path, tiny_model(family, dtype=dtype, attn_implementation="eager"))
    model = add_adapter(bench.loaded.model, "trained", LoraSettings(rank=3, targets=targets), 0).to(dtype)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=source, dtype=dtype) * 0.05)
    bench.loaded.model = model
    return make_context(bench), make_batch(bench, make_rows("row", 5))


def one_by_one(ctx, batch):
    parameters = ctx.parameters()
    losses = ctx.per_sample_loss(batch, grad=True)
    grads = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in losses]
    return {name: torch.stack([row[i] for row in grads]) for i, name in enumerate(parameters)}


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_gradients_of_every_family_equal_one_backward_per_row(tmp_path, family):
    """Grouped key and value heads, GPT-2's Conv1D, Phi-3's joint projections and OPT's flattened MLP among them.

    Families other than GPT-2 compute their norms in fp32 (see `float64_model`).
    """
    ctx, batch = scene(tmp_path, family)
    before, hooks = snapshot(ctx.model), count_hooks(ctx.model)
    found = dict(row_gradients(ctx, batch))
    expected = one_by_one(ctx, batch)
    assert found.keys() == expected.keys() and len(found) >= 16
    scale = max(grad.abs().max() for grad in expected.values())
    assert max((found[name] - expected[name]).abs().max() for name in found) < 1e-10 * scale
    assert min(grad.abs().max() for grad in expected.values()) > 0, "no gradient is trivially zero"
    assert same_bits(before, snapshot(ctx.model)) and count_hooks(ctx.model) == hooks
    assert all(p.grad is None for p in ctx.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_and_biases_of_linear_layers_count_too(tmp_path, family):
    bench = make_bench(tmp_path, tiny_model(family, dtype=torch.float64, attn_implementation="eager"))
    model = bench.loaded.model.requires_grad_(False)
    blocks = model.model.layers[1] if family == "llama" else model.transformer.h[1]
    blocks.mlp.requires_grad_(True)
    ctx, batch = make_context(bench), make_batch(bench, make_rows("row", 4))
    found, expected = dict(row_gradients(ctx, batch)), one_by_one(ctx, batch)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-10, atol=1e-14)


def test_a_layer_that_is_called_twice_adds_up(tmp_path):
    bench = make_bench(tmp_path, tiny_model(dtype=torch.float64, attn_implementation="eager"))
    layers = bench.loaded.model.requires_grad_(False).model.layers
    layers[1].mlp = layers[0].mlp.requires_grad_(True)
    ctx, batch = make_context(bench), make_batch(bench, make_rows("row", 4))
    found, expected = dict(row_gradients(ctx, batch)), one_by_one(ctx, batch)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-10, atol=1e-14)


def test_full_parameters_are_refused_by_name(tmp_path):
    ctx = make_context(make_bench(tmp_path))
    with pytest.raises(TrainingError, match=r"'model\.embed_tokens\.weight' learns too; choose parameters: lora"):
        next(row_gradients(ctx, make_batch(make_bench(tmp_path), make_rows("row", 2))))


def test_bf16_autocast_gives_fp32_gradients(tmp_path):
    ctx, batch = scene(tmp_path, dtype=torch.float32)
    exact = dict(row_gradients(ctx, batch))
    object.__setattr__(ctx.config, "precision", "bf16")
    rough = dict(row_gradients(ctx, batch))
    flat = [torch.cat([g.flatten() for g in grads.values()]) for grads in (exact, rough)]
    assert flat[1].dtype == torch.float32 and torch.corrcoef(torch.stack(flat))[0, 1] > 0.99


# -- the projection ---------------------------------------------------------------------------------------------------


SIZES = (70, SIGNS + 30)  # the second one takes two blocks of signs
D = sum(SIZES)


def blocks(rows=3):
    source = torch.Generator().manual_seed(2)
    return {f"p{i}": torch.randn(rows, size, generator=source) for i, size in enumerate(SIZES)}


def matrix(size, seed=0):
    """The sign matrix, by projecting unit vectors."""
    return projected(zip(("p0", "p1"), torch.eye(D).split(SIZES, 1), strict=True), size, seed)


def test_it_is_one_fixed_matrix_of_fair_signs():
    found = matrix(100)
    assert torch.equal(found.abs(), torch.full_like(found, 0.1))
    assert abs(found.mean()) < 5 * 0.1 / found.numel() ** 0.5
    assert (found.T @ found / D * 100 - torch.eye(100)).abs().max() < 6 / D**0.5, "columns are independent"
    assert (found @ found.T - torch.eye(D)).abs().max() < 0.7, "rows are, across blocks and parameters too"
    assert not torch.equal(found, matrix(100, seed=1))
    whole = torch.cat(list(blocks().values()), 1)
    torch.testing.assert_close(projected(blocks().items(), 100, 0), whole @ found, rtol=1e-4, atol=1e-4)
    one = projected([(name, block[1:2]) for name, block in blocks().items()], 100, 0)
    torch.testing.assert_close(one, (whole @ found)[1:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [64, 1024, 8192])
def test_inner_products_are_kept_within_the_error_of_johnson_and_lindenstrauss(size):
    given = blocks(rows=12)
    whole = torch.nn.functional.normalize(torch.cat(list(given.values()), 1))
    found = projected([(name, block) for name, block in given.items()], size, 0)
    error = torch.nn.functional.normalize(found) @ torch.nn.functional.normalize(found).T - whole @ whole.T
    assert error.abs().max() < 5 / size**0.5
    assert error.pow(2).mean().sqrt() > 0.1 / size**0.5


def test_size_zero_keeps_the_gradients(monkeypatch):
    monkeypatch.setattr(per_row, "_signs", None)
    assert torch.equal(projected(blocks().items(), 0, 0), torch.cat(list(blocks().values()), 1))
