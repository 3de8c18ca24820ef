"""What every registered selector promises: all rows scored, one seed one result, no dependence on the pool's order,
copies alike, kill and resume, nothing left behind.  A new selector joins by one line of CASES.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from benches import Halt, count_hooks, halt_at, make_bench, make_rows

from apothecary.data.rows import Row
from apothecary.registry import entries, lookup
from apothecary.train import early, fit, warm_up
from apothecary.train.config import TrainConfig
from apothecary.train.workbench import Workbench

ROWS = make_rows("pool", 9)
COPY, LONG = replace(ROWS[4], id="copy"), Row("long", (("user", "why " * 90),), "no")
POOL = [*ROWS[:5], LONG, *ROWS[5:], COPY]
ROLES = ("harmful", "benign", "validation", "customer")


def short(**changes: Any) -> TrainConfig:
    """Two optimiser steps with a checkpoint after each, over batches of several rows."""
    return TrainConfig(**{"max_steps": 2, "batch_size": 4, "save_every": 1, "over_long": "drop", **changes})


@dataclass(frozen=True)
class Case:
    """A selector with settings that are quick and take every part of it along."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    model: bool = True  # whether it asks for the model; then over-long rows come last
    copies: bool = True  # whether two rows of equal content score alike


CASES: dict[str, Case] = {
    "dsir": Case({"gumbel": False}, model=False),
    "el2n": Case({"warmup": short(), "checkpoints": 2}),
    "full": Case(model=False),
    "ifd": Case({"warmup": short(), "warmup_rows": 6, "clusters": 2, "floor": 9.0}),  # high: no ratio is above 1
    "k_center": Case({"over_long": "drop"}, copies=False),
    "less": Case({"warmup": short(max_steps=-1, epochs=1), "share": 0.6, "projection_dim": 64}),
    "less_sgd": Case({"warmup": short(max_steps=-1, epochs=1), "share": 0.6}),
    "loss": Case({"warmup": short()}),
    "pharmacist": Case({"warmup": short(batch_size=10), "epochs": 1, "batch_size": 4}, copies=False),
    "post_attack_match": Case({"warmup": short(), "warmup_share": 0.5}),
    "random": Case(model=False, copies=False),
    "seal": Case({"theta": short(reduction="sample_mean")}, copies=False),
    "task_vary": Case({"over_long": "drop"}),
}


def selector(name: str) -> Any:
    return lookup("curate", name)(**CASES[name].settings)


def bench(folder: Any, stop: Callable[[], None] = lambda: None) -> Workbench:
    return make_bench(folder, aux={role: make_rows(role, 7) for role in ROLES}, stop=stop)


def params(*evidence: str) -> list[Any]:
    """Every selector, its test counted as evidence of these kinds."""
    return [pytest.param(name, marks=pytest.mark.evidence(f"curate/{name}", *evidence) if evidence else ())
            for name in CASES]  # fmt: skip


def test_every_selector_is_here():
    assert CASES.keys() == {name for kind, name in entries() if kind == "curate"}


@pytest.mark.parametrize("name", params())
def test_rows_are_scored_by_id_whatever_their_order(tmp_path, name):
    case, one = CASES[name], bench(tmp_path / "one")
    hooks = count_hooks(one.loaded.model)
    scores = selector(name).score(one, POOL)
    assert scores.keys() == {row.id for row in POOL} and not any(map(math.isnan, scores.values()))
    assert (scores["long"] == -math.inf) == case.model
    assert all(math.isfinite(score) for row_id, score in scores.items() if row_id != "long")
    if case.copies:
        assert scores["copy"] == pytest.approx(scores[ROWS[4].id], rel=1e-4, abs=1e-7)
    assert count_hooks(one.loaded.model) == hooks
    turned = selector(name).score(bench(tmp_path / "two"), [*POOL[4:], *POOL[:4]])
    assert turned == pytest.approx(scores, rel=1e-4, abs=1e-7), "neither the order nor a second run changes a score"


@pytest.mark.parametrize("name", params("resume"))
def test_killed_anywhere_the_scores_are_the_same(tmp_path, name):
    calls: list[int] = []
    whole = selector(name).score(bench(tmp_path / "whole", lambda: calls.append(0)), POOL)
    for call in sorted({0, len(calls) // 2, len(calls) - 1} - {-1}) if calls else ():
        with pytest.raises(Halt):
            selector(name).score(bench(tmp_path / str(call), halt_at(call)), POOL)
        assert selector(name).score(bench(tmp_path / str(call)), POOL) == whole
    assert bool(calls) or not CASES[name].model


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.model])
def test_a_selector_of_words_alone_loads_no_model(tmp_path, name):
    def load() -> Any:
        raise AssertionError("the model was loaded")

    aux = {role: make_rows(role, 7) for role in ROLES}
    assert selector(name).score(Workbench(load, aux, 0, tmp_path), POOL).keys() == {row.id for row in POOL}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "warmup" in case.settings])
def test_scores_do_not_depend_on_the_warm_ups_reduction_and_precision(tmp_path, monkeypatch, name):
    """Both belong to the training, which is the same one here whatever they say."""

    def train(bench, method, rows, config, **options):
        return fit.train(bench, method, rows, replace(config, reduction="token_mean", precision="fp32"), **options)

    for module in (early, warm_up):
        monkeypatch.setattr(module, "train", train)
    found = []
    for changes in ({}, {"reduction": "sample_mean"}, {"precision": "bf16"}):
        plain = selector(name)
        method = replace(plain, warmup=replace(plain.warmup, **changes))
        found.append(method.score(bench(tmp_path / str(len(found))), POOL))
    assert found[0] == found[1] == found[2]
