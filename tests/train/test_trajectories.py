"""Ten steps of every training method and twelve scores of every selector, on the lab: the same bits from run to run,
and within 1e-3 of what is stored.

`python -m pytest tests/train/test_trajectories.py --write-trajectories` stores them anew.
"""

from __future__ import annotations

import json
import math
import shutil
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from apothecary.data.sources import load_rows
from apothecary.models.load import LoadedModel, load_model
from apothecary.models.settings import LoraSettings, ModelConfig
from apothecary.registry import entries, lookup
from apothecary.train.config import TrainConfig
from apothecary.train.fit import train
from apothecary.train.workbench import Workbench

STORED = Path(__file__).with_name("trajectories.json")
FILES = {"harmful": "defence", "benign": "benign", "pairs": "pairs", "validation": "validation", "attack": "attack",
         "customer": "customer_train", "general": "customer_general"}  # fmt: skip
CONFIG = TrainConfig(learning_rate=2e-3, max_steps=10, batch_size=4, schedule="constant", warmup_ratio=0.0,
                     lora=LoraSettings(dropout=0.1), save_every=0, log_every=1)  # fmt: skip
SHORT = TrainConfig(learning_rate=2e-3, max_steps=4, batch_size=4, schedule="constant", warmup_ratio=0.0, save_every=0)
# What keeps a method short; everything else stands at its default.
EPOCH = replace(SHORT, max_steps=-1, epochs=1)
SETTINGS: dict[str, dict[str, Any]] = {
    "finetune/security_vectors": {"harmful_rows": 6, "vectors": SHORT},
    "curate/less": {"warmup": EPOCH, "share": 0.7, "projection_dim": 16},
    "curate/less_sgd": {"warmup": EPOCH, "share": 0.7},
    "curate/pharmacist": {"epochs": 1, "batch_size": 6},
    "curate/seal": {"theta": replace(EPOCH, reduction="sample_mean")},
    "align/t_vaccine": {"gamma": 3, "resample": 4, "rescore": 8, "score_rows": 6},
}


@cache
def rows_of(role: str, n: int):
    """The shortest rows of a role, since only their number matters here."""
    rows = load_rows(f"lab:{FILES.get(role, role)}", role)
    return sorted(rows, key=lambda row: (len(row.text) + len(row.response or ""), row.id))[:n]


@cache
def lab() -> LoadedModel:
    return load_model(ModelConfig("lab", device="cpu"))


def make(name: str):
    kind, method = name.split("/")
    cls = lookup(kind, method)
    settings = dict(SETTINGS.get(name, {}))
    if "warmup" in getattr(cls, "__dataclass_fields__", ()):
        settings.setdefault("warmup", SHORT)
    return cls(**settings)


def bench_for(method, folder: Path) -> Workbench:
    aux = {role: rows_of(role, 6) for role in method.needs.every_role}
    return Workbench(replace(lab(), model=deepcopy(lab().model)), aux, 0, folder)


def trajectory(name: str, folder: Path) -> list[float]:
    """The loss of each of ten steps, and a hundredth of the sum of what was trained."""
    method = make(name)
    prepared = folder / "prepared"
    if method.needs.prepared:
        method.prepare(bench_for(method, folder / "preparation"), prepared)
    bench = bench_for(method, folder / "training")
    bench.prepared = prepared if method.needs.prepared else None
    rows = rows_of("align" if name.startswith("align") else "customer", 16)
    losses = [entry["loss"] for entry in train(bench, method, rows, CONFIG).history]
    moved = sum(p.detach().double().sum() for p in bench.loaded.model.parameters() if p.requires_grad)
    return [*losses, float(moved) / 100]


def scores(name: str, folder: Path) -> list[float]:
    """The scores of twelve rows, divided by the largest."""
    method = make(name)
    rows = rows_of("align", 12)
    found = list(method.score(bench_for(method, folder), rows).values())
    largest = max(abs(value) for value in found if math.isfinite(value)) or 1.0
    return [value / largest if math.isfinite(value) else value for value in found]


CASES = [f"{kind}/{name}" for (kind, name), entry in entries().items()
         if kind in ("curate", "align", "finetune") and entry.module.startswith("apothecary.")]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers_as_before(tmp_path, name, request):
    compute = scores if name.startswith("curate") else trajectory
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        once = compute(name, tmp_path / "once")
        torch.manual_seed(torch.seed() % 1000)  # another state of the global generator must change nothing
        shutil.rmtree(tmp_path / "once", ignore_errors=True)
        assert compute(name, tmp_path / "once") == once, "bit-equal from run to run"
    finally:
        torch.set_num_threads(threads)
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    if request.config.option.write_trajectories:
        stored = {key: stored[key] for key in stored if key in CASES} | {name: [float(f"{x:.6g}") for x in once]}
        lines = (f"  {json.dumps(key)}: {json.dumps(stored[key])}" for key in sorted(stored))
        STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert name in stored, f"store a trajectory of {name} with --write-trajectories"
    assert once == pytest.approx(stored[name], abs=1e-3, rel=0)
