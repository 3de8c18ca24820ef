"""Maximum mean discrepancy against its definition (methods.md 4.4)."""

from __future__ import annotations

import pytest
import torch
from reference import repnoise as reference

from apothecary.train.mmd import mmd


def sample(rows, features, seed, dtype=torch.float64):
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.evidence("align/repnoise", "definition")
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_it_equals_the_definition_pair_by_pair(rows):
    x, y = 0.3 * sample(rows, 7, 0) + 1, sample(rows, 7, 1)
    expected = reference.mmd(x, y, reference.mean_distance([*x, *y]))
    assert mmd(x, y).item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.evidence("align/repnoise", "definition")
def test_a_sample_is_at_no_distance_from_itself_and_shifts_move_it_away():
    x = sample(6, 10, 0)
    assert abs(mmd(x, x).item()) < 1e-12 and mmd(x[:1], x[:1]).item() == 0
    distances = [mmd(x, x + shift).item() for shift in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)]
    assert distances == sorted(distances) and distances[0] < 1e-12 and len(set(distances)) == 6


def test_the_bandwidth_is_constant_in_the_gradient():
    x, y = sample(3, 4, 0).requires_grad_(), sample(3, 4, 1)
    (found,) = torch.autograd.grad(mmd(x, y), x)
    spread = reference.mean_distance([*x.detach(), *y])
    way, eps = sample(3, 4, 2), 1e-6
    up, down = (reference.mmd(x.detach() + t * way, y, spread).item() for t in (eps, -eps))
    assert (found * way).sum().item() == pytest.approx((up - down) / (2 * eps), rel=1e-6)


def test_features_of_zeros_add_nothing_and_bf16_is_computed_in_fp32():
    x, y = sample(4, 5, 0), sample(4, 5, 1)
    wide = (torch.nn.functional.pad(t, (3, 2)) for t in (x, y))
    assert mmd(*wide).item() == pytest.approx(mmd(x, y).item(), rel=1e-12)
    low = mmd(x.bfloat16(), y.bfloat16())
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(mmd(x.bfloat16().double(), y.bfloat16().double()).item(), rel=1e-5)


def test_kernels_and_factor_set_the_bandwidths():
    x, y = sample(4, 5, 0), sample(4, 5, 1)
    one = mmd(x, y, kernels=1)
    assert mmd(x, y, kernels=3, factor=1.0).item() == pytest.approx(3 * one.item(), rel=1e-12)
    assert mmd(x, y, kernels=3, factor=4.0).item() != pytest.approx(mmd(x, y, kernels=3).item(), rel=1e-3)
