"""A harmful gradient step that is taken, looked at and undone; what selectors that simulate the attacker share.

    theta' = theta - alpha * grad h(theta)         (normalised: grad h / |grad h|)
    v = grad f(theta');   exact: v <- (d theta' / d theta)^T v = v - alpha * H_h(theta) v

h and f are losses over batches that share one normaliser, so that a whole set may come in parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from apothecary.train.batch import Batch, collate, weigh
from apothecary.train.internals import global_norm
from apothecary.train.scores import Weights, combine, inner, scaled, summed

if TYPE_CHECKING:
    from apothecary.train.context import StepContext
    from apothecary.train.workbench import Workbench

SMALLEST = 1e-12  # a gradient of zero stays zero when it is normalised
ROWS = 32  # of a set at a time


def whole_set(bench: Workbench, ctx: StepContext, role: str) -> list[Batch]:
    """All rows of a role in batches of similar length whose losses add up to the mean; a row too long is refused."""
    strict = replace(ctx.config, over_long="error")
    rendered = sorted(bench.render(bench.aux[role], strict), key=lambda row: len(row.ids))
    normaliser = weigh(rendered, ctx.config.reduction)
    return [collate(rendered[i : i + ROWS], bench.pad_id, normaliser).to(ctx.device)
            for i in range(0, len(rendered), ROWS)]  # fmt: skip


def post_attack_gradient(ctx: StepContext, harmful: Sequence[Batch], validation: Sequence[Batch], alpha: float,
                         normalise: bool = False, exact: bool = False) -> Weights:  # fmt: skip
    """v at the current parameters; with `exact`, the chain rule through the step by one double backward."""
    attack = summed(ctx.grads(batch) for batch in harmful)
    norm = global_norm(attack.values()).clamp_min(SMALLEST) if normalise else 1.0
    with ctx.perturbed(scaled(attack, -alpha / norm)):
        target = summed(ctx.grads(batch) for batch in validation)
    if not exact:
        return target
    across = combine(target, attack, -inner(attack, target) / norm**2) if normalise else target
    curved = summed(ctx.hessian_vector(batch, across) for batch in harmful)
    return combine(target, curved, -alpha / norm)
