"""Maximum mean discrepancy: how far apart two samples lie, as seen by a sum of Gaussian kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def mmd(x_BF: Tensor, y_BF: Tensor, kernels: int = 5, factor: float = 2.0) -> Tensor:
    """MMD^2 of two samples of B rows with F features, a scalar in at least fp32.

        mean_ij k(x_i, x_j) + k(y_i, y_j) - 2 k(x_i, y_j),   k(u, v) = sum_i exp(-|u - v|^2 / (s * factor^(i - n // 2)))

    over n = `kernels` bandwidths; s, the mean squared distance of distinct rows of both samples, is held constant in
    the gradient.
    """
    rows_RF = torch.cat([x_BF, y_BF])
    rows_RF = rows_RF.to(torch.promote_types(rows_RF.dtype, torch.float32))
    count = len(rows_RF)
    squares_R = rows_RF.square().sum(1)
    distances_RR = (squares_R[:, None] + squares_R - 2 * rows_RF @ rows_RF.T).clamp_min(0)
    spread = (distances_RR.detach().sum() / (count * (count - 1))).clamp_min(1e-30)
    powers = [factor ** (i - kernels // 2) for i in range(kernels)]
    kernel_RR = torch.stack([torch.exp(-distances_RR / (spread * power)) for power in powers]).sum(0)
    side_R = torch.ones_like(squares_R)
    side_R[len(x_BF) :] = -1.0
    return side_R @ kernel_RR @ side_R / len(x_BF) ** 2
