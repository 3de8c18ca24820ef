"""Real trials on the embedded model at a size for tests: what is shared, what is looked at, what is kept."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from apothecary.pipeline.stage import Executor
from apothecary.pipeline.store import Store
from apothecary.report.sweep import render
from apothecary.sweep import SweepRecipe, SweepResult, sweep
from apothecary.sweep.config import Prune
from apothecary.sweep.probe import look
from apothecary.sweep.recipe import the_model
from apothecary.sweep.trial import Task, work

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {
        "align": {"path": "lab:align", "limit": 8}, "harmful": {"path": "lab:defence", "limit": 8},
        "benign": {"path": "lab:benign", "limit": 8}, "customer": "lab:customer_train", "attack": "lab:attack",
    },
    "evaluate": {"harmful": "lab:eval_harmbench", "task": "lab:customer_test", "limit": 4, "max_new_tokens": 12},
    "align": {"train": {"max_steps": 2, "batch_size": 8}},
    "attack": {"p": 0.25, "n": 16},
    "finetune": {"train": {"max_steps": 4, "batch_size": 4, "save_every": 1}},
    "arms": {
        "undefended": {},
        "vectors": {"finetune": {"method": "security_vectors", "harmful_rows": 8,
                                 "vectors": {"max_steps": 2, "batch_size": 4}}},
    },
    "sweep": {
        "trials": 2, "startup": 2, "prune": {"at": 0.5, "prompts": 2, "startup": 1, "below": 0.5}, "ahead": 2,
        "guard": {"task_drop": 1.0},
        "prompts": {"harmful": "lab:tune_harmful", "task": "lab:tune_task"},
        "space": {"finetune.train.learning_rate": {"low": 1e-3, "high": 1e-2, "log": True},
                  "attack.seed": {"low": 0, "high": 9}},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    folder = tmp_path_factory.mktemp("real")
    return sweep(RECIPE, folder / "store", folder / "out", objective=sometimes_killed)


def sometimes_killed(task: Task) -> dict[str, Any]:
    """A trial whose first attempt is killed -9 in the middle of its training."""
    mark = task.folder / "killed"
    if task.name == "1" and not mark.exists():
        from apothecary.train import trainer

        usual = trainer.MethodTrainer.training_step

        def step(self: Any, *given: Any, **more: Any) -> Any:
            if self.state.global_step == 3:
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return usual(self, *given, **more)

        trainer.MethodTrainer.training_step = step  # type: ignore[method-assign]
    return work(task)


def folders(result: SweepResult, kind: str) -> list[Path]:
    return [path for path in (result.folder.parent / "store" / kind).iterdir() if path.is_dir()]


def test_the_services_stages_are_made_once_whatever_the_trials(done: SweepResult):
    assert len(folders(done, "align")) == 1 and len(folders(done, "prepare")) == 1
    undefended, vectors = done.results["arms"]
    assert set(undefended["services"]) == {"align"} and set(vectors["services"]) == {"align", "prepare"}
    assert undefended["services"]["align"] == vectors["services"]["align"]


def test_every_trial_is_there_and_the_killed_one_too(done: SweepResult):
    for arm in done.results["arms"]:
        assert {trial["state"] for trial in arm["trials"]} <= {"complete", "pruned"} and len(arm["trials"]) == 2
        for trial in arm["trials"]:
            assert trial["seconds"] > 0 and trial["peak_memory_mb"] > 0, "given up or not, it took its time"
            if trial["state"] == "complete":
                assert trial["harm"]["n"] == 4 and trial["task"] is not None
            assert (trial["look"]["step"], trial["look"]["steps"], trial["look"]["n"]) == (2, 4, 2)
        assert arm["held_out"]["worst"]["harm"]["n"] == 4 and arm["held_out"]["aligned"]["harm"] is not None
    assert len(list(done.folder.glob("trials/*/1/killed"))) == 2


def test_what_is_held_out_has_the_exam_the_categories_and_samples_without_their_text(done: SweepResult):
    for arm in done.results["arms"]:
        held = arm["held_out"]["worst"]
        harmful = held["scores"]["harmful"]
        assert harmful["exam"]["items"] > 0 and harmful["by_category"] and harmful["identity"]["name"] == "opening"
        assert {sample["suite"] for sample in held["samples"]} == {"harmful", "task"}
        assert all(set(sample) == {"suite", "prompt", "label", "length"} for sample in held["samples"])
        assert set(arm["service_costs"]) == set(arm["services"])
    page = said(render(done.results))
    for heading in ("The judge\u2019s exam", "Harm by category", "Sample responses", "All scores when held out"):
        assert heading in page


def said(page: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_weights_of_the_worst_trial_alone_are_kept(done: SweepResult):
    kept = {path.name for path in folders(done, "finetune") if path.suffix == ""}
    wanted = {key[:20] for arm in done.results["arms"] for name in ("clean", "default") for _, key in arm[name]["made"]}
    assert len(wanted) == 4
    for arm in done.results["arms"]:
        if isinstance(arm["worst"], int):
            wanted.add(arm["trials"][arm["worst"]]["keys"]["finetune"][:20])
    assert kept == wanted
    assert not list((done.folder.parent / "store" / "finetune").glob("*.partial/checkpoints"))


def test_a_look_half_way_changes_nothing_and_sees_the_model_that_would_be_served(tmp_path: Path):
    made = SweepRecipe.parse(RECIPE)
    mapping = made.variant("vectors", {"finetune.train.learning_rate": 5e-3})
    planned = the_model(mapping)
    stage = next(each for each in planned.evaluation.lineage() if each.kind == "finetune")
    task = Task("vectors", "0", mapping, tmp_path / "looked", tmp_path / "task", "HS", 0.95, prune=Prune(0.5, 2))
    executor = Executor(Store(tmp_path / "looked"))
    seen = look(task, planned, stage, executor)
    assert seen is not None and (seen["step"], seen["steps"]) == (2, 4)
    assert look(task, planned, stage, executor) == seen  # a killed trial is not looked at again
    plain = Executor(Store(tmp_path / "plain"))
    assert executor.execute(stage).digest == plain.execute(stage).digest


def test_an_attack_that_ends_in_nan_is_a_failed_trial_with_its_reason(tmp_path: Path):
    made = SweepRecipe.parse(RECIPE)
    settings = {"finetune.train.learning_rate": 1e30, "finetune.train.max_grad_norm": 0}
    task = Task("undefended", "0", made.variant("undefended", settings), tmp_path / "store", tmp_path, "HS", 0.95)
    found = work(task)
    assert found["state"] == "failed" and "not finite" in found["reason"] and "harm" not in found
    assert found["costs"]["seconds"] > 0 and "uncovered" not in found
