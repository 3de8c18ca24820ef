"""Weights of rows: the softmax Jacobian against autograd, Adam against torch's, states that survive a kill."""

from __future__ import annotations

import pytest
import torch
from benches import float64_model, furthest, make_bench, make_context
from tiny import tiny_model

from apothecary.train import row_weights

PHARMACIST, SEAL = (pytest.mark.evidence(f"curate/{name}", "definition") for name in ("pharmacist", "seal"))


def test_weights_have_mean_one():
    w = torch.randn(8)
    assert row_weights.sigma(w, range(8)).mean().item() == pytest.approx(1.0)
    assert torch.equal(row_weights.sigma(w, [3, 1]), row_weights.sigma(w, range(8))[[3, 1]])


@PHARMACIST
@SEAL
@pytest.mark.parametrize("chosen", [[5, 1, 3], list(range(7)), []])
def test_the_gradient_is_that_of_the_weighted_mean(chosen):
    w = torch.randn(7, dtype=torch.float64, requires_grad=True)
    coefficients = torch.randn(len(chosen), dtype=torch.float64)
    (expected,) = torch.autograd.grad((row_weights.sigma(w, chosen) * coefficients).sum() / 4, w)
    found = row_weights.gradient(w.detach(), chosen, coefficients, 4)
    assert furthest({"w": found}, {"w": expected}) < 1e-12
    assert abs(found.sum().item()) < 1e-12, "the softmax does not feel a common shift"


@PHARMACIST
@SEAL
def test_steps_are_those_of_adam(tmp_path):
    state = row_weights.fresh(make_context(make_bench(tmp_path, float64_model())), 5, 0.1)
    assert state["w"].dtype == torch.float64
    w = state["w"].clone().requires_grad_()
    optimiser = torch.optim.Adam([w], lr=5e-3, betas=(0.8, 0.95))
    for _ in range(4):
        w.grad = torch.randn(5, dtype=torch.float64)
        row_weights.descend(state, w.grad, 5e-3, (0.8, 0.95))
        optimiser.step()
    torch.testing.assert_close(state["w"], w.detach(), rtol=1e-12, atol=0)


@PHARMACIST
def test_without_betas_a_step_goes_along_the_gradient(tmp_path):
    state = row_weights.fresh(make_context(make_bench(tmp_path)), 3, 0.1)
    row_weights.descend(state, torch.tensor([1.0, 0.0, -2.0]), 0.5, None)
    assert state["w"].tolist() == pytest.approx([-0.4, 0.1, 1.1]) and state["steps"] == 1


def test_weights_are_fp32_over_a_half_precision_model(tmp_path):
    ctx = make_context(make_bench(tmp_path, tiny_model("llama", dtype=torch.bfloat16)))
    assert row_weights.fresh(ctx, 3, 0.1)["w"].dtype == torch.float32


def test_a_saved_state_comes_back_and_a_broken_write_leaves_the_one_before(tmp_path, monkeypatch):
    file, device = tmp_path / "deep" / "w.pt", torch.device("cpu")
    assert row_weights.load(file, device) is None
    state = row_weights.fresh(make_context(make_bench(tmp_path)), 3, 0.1) | {"steps": 7, "difference": 1e-2}
    row_weights.save(state, file)

    def full_disk(_state, partial):
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        row_weights.save({}, file)
    again = row_weights.load(file, device)
    assert again["steps"] == 7 and again["difference"] == 1e-2 and torch.equal(again["w"], state["w"])
