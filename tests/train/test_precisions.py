"""Every way of aligning, with an adapter and with full parameters, under bf16 autocast and gradient checkpointing."""

from __future__ import annotations

import math

import pytest
import torch
from benches import Recorder, make_rows
from cases import CASES, Case
from tiny import tiny_model

from apothecary.errors import TrainingError
from apothecary.registry import entries
from apothecary.train import fit
from apothecary.train.config import TrainConfig
from apothecary.train.method import TrainingMethod

ALIGNING = {name: case for name, case in CASES.items() if case.method.startswith(("align/", "finetune/"))}
SETTINGS = {
    "bf16": {"precision": "bf16"}, "checkpointing": {"gradient_checkpointing": True},
    "both": {"precision": "bf16", "gradient_checkpointing": True},
}  # fmt: skip


def test_every_aligner_is_here_with_an_adapter_and_with_full_parameters():
    layouts = {(case.method, case.parameters) for case in ALIGNING.values()}
    aligners = {f"{kind}/{name}" for kind, name in entries() if kind == "align"}
    assert {(name, parameters) for name in aligners for parameters in ("lora", "full")} <= layouts


class Noted(Recorder):
    """Notes what learns before the first step and after the last."""

    def step(self, ctx, batch, state):
        assert all(p.dtype == torch.float32 for p in ctx.parameters().values()), "what learns stays in fp32"
        if not self.batches:
            self.before = {name: p.detach().clone() for name, p in ctx.parameters().items()}
        return super().step(ctx, batch, state)

    def finish(self, ctx, state):
        self.after = {name: p.detach().clone() for name, p in ctx.parameters().items()}
        super().finish(ctx, state)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ALIGNING)
def test_two_steps_are_finite_and_move_what_learns(tmp_path, name, settings):
    case: Case = ALIGNING[name]
    bench, noted = case.bench(tmp_path, tiny_model), Noted(case.make())
    config = TrainConfig(**{"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "save_every": 0, "log_every": 1,
                            "warmup_ratio": 0.0, "parameters": case.parameters, **SETTINGS[settings],
                            **case.settings})  # fmt: skip
    result = fit.train(bench, noted, make_rows("row", 8), config)
    losses = [entry["loss"] for entry in result.history]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    moved = [name for name, start in noted.before.items() if not torch.equal(start, noted.after[name])]
    assert len(moved) > len(noted.before) // 3 and all(p.isfinite().all() for p in noted.after.values())
    assert all(("lora_" in name) == (case.parameters == "lora") for name in moved)


@pytest.mark.parametrize("layout", fit.LAUNCHES)
@pytest.mark.parametrize("name", ALIGNING)
def test_a_launch_layout_that_no_training_can_keep_is_refused(tmp_path, monkeypatch, name, layout):
    monkeypatch.setenv(f"ACCELERATE_USE_{layout.upper()}", "true")
    bench = ALIGNING[name].bench(tmp_path, tiny_model)
    for method in (ALIGNING[name].make(), TrainingMethod()):  # the other one is a selector's warm-up
        with pytest.raises(TrainingError, match=f"cannot run in layout '{layout}'; launch it as single or data_para"):
            fit.train(bench, method, make_rows("row", 8), TrainConfig(max_steps=1))
