"""The table of training methods that the shared tests go through: one line for each layout of a method.

    accumulation   1x8 = 2x4 = 8x1 in float64; a method of one micro-batch (`linear=False`) sums independent steps
    two_processes  two gloo processes end with the weights of one
    resume         killed anywhere and resumed, a training ends with the same bytes

Each counts for the badge of `method` (tests/fidelity).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from benches import Recorder, make_bench, make_pairs, make_rows
from torch import nn

from apothecary.align.booster import Booster
from apothecary.align.repnoise import RepNoise
from apothecary.align.sft import Sft
from apothecary.align.t_vaccine import TVaccine
from apothecary.align.vaccine import Vaccine
from apothecary.curate.seal import Seal, WeightedTraining
from apothecary.data.rows import Row
from apothecary.finetune.security_vectors import LEARNED, VECTORS, SecurityVectors, VectorTraining
from apothecary.finetune.sft import Sft as CustomerSft
from apothecary.models.adapters import adapter_parameters, add_adapter, save_adapter
from apothecary.models.settings import ATTENTION, LoraSettings
from apothecary.train.config import TrainConfig
from apothecary.train.method import TrainingMethod
from apothecary.train.workbench import Workbench

SHARED = ("accumulation", "two_processes", "resume")


def auxiliary() -> dict[str, list[Row]]:
    """Rows of every role; add a role here when a method needs it."""
    rows = {role: make_rows(role, 7) for role in ("harmful", "benign", "validation", LEARNED)}
    return rows | {"pairs": make_pairs(7)}


@dataclass(frozen=True)
class Case:
    """A method with settings under which the shared tests hold."""

    method: str  # kind/name in the registry
    make: Callable[[], TrainingMethod]
    parameters: str = "full"
    linear: bool = True  # whether a step is the sum over its rows; False: it is defined on a micro-batch
    tests: Sequence[str] = SHARED
    settings: Mapping[str, Any] = field(default_factory=dict)  # of TrainConfig, on top of the test's own
    prepare: Callable[[Workbench, Path], Any] | None = None  # fills the prepared folder
    at_work: str = ""  # a logged value that must stay above 1e-4 after the first step, so that the test sees its term

    def bench(self, folder: Path, model: Callable[[], nn.Module], **options: Any) -> Workbench:
        """A workbench over a new model; the prepared folder is filled at the first call for a folder."""
        if self.prepare is not None:
            prepared = folder / f"prepared-{os.environ.get('RANK', 0)}"
            if not prepared.exists():
                self.prepare(make_bench(folder / "preparation", model(), aux=auxiliary()), prepared)
            options["prepared"] = prepared
        return make_bench(folder, model(), aux=auxiliary(), **options)


def _vectors(bench: Workbench, folder: Path) -> None:
    """Vectors of random numbers: they need not be good here, but equal in every process."""
    model = add_adapter(bench.loaded.model, VECTORS, LoraSettings(targets=ATTENTION), 0)
    source = torch.Generator().manual_seed(0)
    for tensor in adapter_parameters(model, VECTORS).values():
        torch.nn.init.normal_(tensor, 0.0, 0.1, source)
    save_adapter(model, VECTORS, folder / VECTORS)


def _t_vaccine() -> TVaccine:
    """Other layers at each step, other scores at every second one, so that whatever is not kept shows."""
    return TVaccine(gamma=1, resample=1, rescore=2, score_rows=5)


def _training(**inner: float) -> VectorTraining:
    return VectorTraining(lamb=1.0, target_nll=0.0, **inner)  # type: ignore[arg-type]


def _seal() -> WeightedTraining:
    theta = TrainConfig(batch_size=8, reduction="sample_mean")
    return WeightedTraining(Seal(ul=0.6, ul_decay=0.1, theta=theta), {f"row{i}": i for i in range(12)})


_VECTORS = "finetune/security_vectors"
CASES: dict[str, Case] = {
    "sft": Case("align/sft", Sft, "lora"),
    "sft full": Case("align/sft", Sft),
    "customer": Case("finetune/sft", CustomerSft, "lora"),
    "vaccine": Case("align/vaccine", Vaccine, linear=False),
    "vaccine lora": Case("align/vaccine", Vaccine, "lora", linear=False),
    "vaccine by row": Case("align/vaccine", lambda: Vaccine(norm_scope="sample")),
    "vaccine merged": Case("align/vaccine", lambda: Vaccine(probe="merged"), "lora", linear=False, tests=SHARED[:2]),
    "t_vaccine": Case("align/t_vaccine", _t_vaccine, linear=False, tests=SHARED[1:]),
    "t_vaccine lora": Case("align/t_vaccine", _t_vaccine, "lora", linear=False, tests=SHARED[1:]),
    "booster": Case("align/booster", Booster, at_work="regulariser"),
    "booster lora": Case("align/booster", Booster, "lora", at_work="regulariser"),
    "repnoise": Case("align/repnoise", lambda: RepNoise(beta=1.0), linear=False),
    "repnoise lora": Case("align/repnoise", lambda: RepNoise(beta=1.0), "lora", linear=False),
    "seal": Case("curate/seal", _seal, settings={"reduction": "sample_mean"}, at_work="weighted_loss"),
    "seal lora": Case("curate/seal", _seal, "lora", settings={"reduction": "sample_mean"}, at_work="weighted_loss"),
    "vectors": Case(_VECTORS, _training, "lora", at_work="benign_kl"),
    "vectors with inner steps": Case(
        _VECTORS, lambda: _training(inner_steps=2, inner_learning_rate=0.1), "lora", at_work="benign_kl"
    ),
    "merged": Case(_VECTORS, SecurityVectors, "lora", prepare=_vectors),
    "branch": Case(_VECTORS, lambda: SecurityVectors(execution="branch"), "lora", prepare=_vectors),
    "merged full": Case(_VECTORS, SecurityVectors, prepare=_vectors),
    "branch full": Case(_VECTORS, lambda: SecurityVectors(execution="branch"), prepare=_vectors),
}


def params(test: str, linear: bool | None = None) -> list[Any]:
    """The cases of a shared test, for `parametrize("case", ...)`, each marked as evidence."""
    return [
        pytest.param(case, id=name, marks=pytest.mark.evidence(case.method, test))
        for name, case in CASES.items()
        if test in case.tests and linear in (None, case.linear)
    ]


class Seeded(Recorder):
    """A recorder in float64 that seeds each share of a step by its place, so that methods which draw noise draw the
    same for the same rows, however the step is divided.
    """

    def __init__(self, method: TrainingMethod) -> None:
        super().__init__(method, to_float64=True)

    def step(self, ctx, batch, state):
        seed_share(ctx, len(self.batches) - (ctx.micro > 0))
        return super().step(ctx, batch, state)


def seed_share(ctx, step: int) -> None:
    parts, part = ctx.processes * ctx.window, ctx.micro * ctx.processes + ctx.auxiliary.rank
    torch.manual_seed(1000 * step + 100 * parts + part)
