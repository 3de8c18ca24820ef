"""What an attacker does who knows the defence: rows that security vectors miss, training past a radius of perturbation.

    vectors   l_i = mean token loss of row i with the vectors active, on the aligned model; large ones keep a gradient
    radius    d = ||(e_1' - e_1 .. e_L' - e_L)|| over a batch of the attacker's rows, e_l and e_l' the attention outputs
              of the aligned model before and after his training; the weakest point of `GRID` with d > rho is taken

rho is that of Vaccine, or of T-Vaccine, which spreads it over gamma of the L layers: d then counts for sqrt(gamma / L).
Booster perturbs weights and no hidden states: there d is the norm of what his training changes of the weights, and
alpha, the length of Booster's step, the radius.  The papers promise nothing beyond the radius, and nothing within it.
Both are ours.  Shape legend: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apothecary.config import build
from apothecary.errors import TrainingError
from apothecary.models import adapters
from apothecary.train.batch import Batch, collate, weigh
from apothecary.train.config import TrainConfig
from apothecary.train.drift import row_norms
from apothecary.train.fit import TRAINED, train
from apothecary.train.method import Defence, TrainingMethod
from apothecary.train.sweep import sweep
from apothecary.train.vectors import VECTORS
from apothecary.train.warm_up import scoring

if TYPE_CHECKING:
    from apothecary.data.rows import Row
    from apothecary.train.workbench import Workbench

log = logging.getLogger(__name__)
GRID = ((1, 1), (3, 1), (3, 3), (10, 3))  # factors of learning rate and of epochs, weakest first
Hidden = dict[int, Tensor]


def losses_under_vectors(bench: Workbench, rows: Sequence[Row], defence: Defence) -> dict[str, float]:
    """l_i in nats per token by row id; -inf for a row that the customer's training drops for its length."""
    assert defence.folder is not None
    config = build(TrainConfig, defence.tuning, "finetune.train")
    model = adapters.load_adapter(bench.loaded.model, VECTORS, defence.folder / VECTORS)
    bench.loaded.model = model  # type: ignore[assignment]
    try:
        ctx = scoring(bench, config)
        return sweep(bench, ctx, rows, ctx.per_sample_loss, config, "loss under vectors")
    finally:
        bench.loaded.model = adapters.remove_adapter(bench.loaded.model, VECTORS)  # type: ignore[assignment]


def past_the_radius(bench: Workbench, rows: Sequence[Row], defence: Defence) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what changes of the customer's TrainConfig, what was measured); where no point gets past, the furthest one."""
    given = build(TrainConfig, defence.tuning, "finetune.train")
    radius = float(defence.fields["alpha" if defence.name == "booster" else "rho"])
    tried: list[tuple[float, dict[str, Any]]] = []
    for rate, length in GRID:
        changes: dict[str, Any] = {"learning_rate": given.learning_rate * rate, "epochs": given.epochs * length}
        if given.max_steps > 0:
            changes["max_steps"] = given.max_steps * length
        moved = _movement(bench, rows, replace(given, save_every=0, **changes), defence, len(tried))
        tried.append((moved, changes))
        if moved > radius:
            break
    moved, changes = max(tried, key=lambda point: point[0])
    found = {"radius": radius, "moved": moved if math.isfinite(moved) else None, "past": moved > radius,
             "tried": [{**point, "moved": d if math.isfinite(d) else None} for d, point in tried]}  # fmt: skip
    return ({} if changes == tried[0][1] else changes), found


def _movement(bench: Workbench, rows: Sequence[Row], config: TrainConfig, defence: Defence, number: int) -> float:
    """d after a training of its own on the rows; -inf where it breaks down."""
    torch.manual_seed(bench.seed)
    source = bench.source if callable(bench.source) else copy.deepcopy(bench.loaded)
    trial = replace(bench, source=source, folder=bench.folder / "checkpoints" / f"trial-{number}", progress=False)
    weights = defence.name == "booster"
    batch = _probe(trial, rows, config, build(TrainConfig, defence.train, "align.train").batch_size)
    before = _weights(trial) if weights and config.parameters == "full" else {} if weights else _hidden(trial, batch)
    try:
        train(trial, TrainingMethod(), rows, config)
    except TrainingError as error:
        log.info(f"the attacker's training with learning rate {config.learning_rate:g} ends early: {error}")
        return -math.inf
    trial.loaded.model.eval()
    if weights:
        return _change(trial, before)  # type: ignore[arg-type]
    return drift(before, _hidden(trial, batch), defence)  # type: ignore[arg-type]


def drift(before: Hidden, after: Hidden, defence: Defence) -> float:
    """d between attention outputs, [B, T, D] by layer; with scope "sample" the mean over rows of each row's own."""
    norms_BL = row_norms({layer: after[layer] - hidden for layer, hidden in before.items()})
    norms_BL = norms_BL * math.sqrt(defence.fields.get("gamma", len(before)) / len(before))
    if defence.fields.get("norm_scope") == "sample":
        return norms_BL.norm(dim=1).mean().item()
    return torch.linalg.vector_norm(norms_BL).item()


def _probe(bench: Workbench, rows: Sequence[Row], config: TrainConfig, size: int) -> Batch:
    """As many of the attacker's rows as a batch of the alignment had: what its radius spans."""
    mine = [row for row in rows if row.role == "attack"] or list(rows)
    rendered = bench.render(mine, config)[:size]
    return collate(rendered, bench.pad_id, weigh(rendered, config.reduction))


def _hidden(bench: Workbench, batch: Batch) -> Hidden:
    """e_l, [B, T, D], in at least fp32 and 0 at padding."""
    ctx = bench.context(TrainConfig())
    batch = batch.to(ctx.device)
    found = ctx.forward(batch, ("attn_out",), grad=False, logits=False).collected["attn_out"]
    mask_BT1 = batch.attention_mask[:, :, None]
    return {layer: out.to(torch.promote_types(out.dtype, torch.float32)) * mask_BT1.to(out.device)
            for layer, out in found.items()}  # fmt: skip


def _weights(bench: Workbench) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in bench.loaded.model.named_parameters()}


def _change(bench: Workbench, before: dict[str, Tensor]) -> float:
    """The norm of what a training has changed of the weights, of an adapter's s B A among them."""
    model = bench.loaded.model
    parts = list(adapters.adapter_delta(model, TRAINED).values()) if not before else [
        p.detach().float() - before[name].float() for name, p in model.named_parameters()]  # fmt: skip
    return math.sqrt(sum(part.double().square().sum().item() for part in parts))
