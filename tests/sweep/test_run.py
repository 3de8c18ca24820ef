"""The machinery of a sweep with a fake objective in real processes: kills, failures, resuming, reproducibility."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sweep import fakes

import apothecary
from apothecary.errors import ConfigError, StoreError, TrainingError
from apothecary.pipeline.stage import Cancelled
from apothecary.report.sweep import render
from apothecary.report.sweep_text import guard_rows, remarks, sentence
from apothecary.sweep import SweepResult, launch, sweep
from apothecary.sweep import run as drive

TESTS = Path(__file__).parents[1]
launch.WARM = ("sweep.fakes",)  # nothing here needs torch


def run(folder: Path, mapping: dict[str, Any] = fakes.RECIPE, objective: Any = fakes.plain, order: int | None = None,
        **more: Any) -> SweepResult:  # fmt: skip
    """A sweep in real processes; with `order` in this one, its tasks ending in that order."""
    with pytest.MonkeyPatch.context() as patch:
        if order is not None:
            patch.setattr(drive, "_launcher", lambda recipe, work: fakes.Inline(work, order))
        return sweep(mapping, folder / "store", folder / "out", objective=objective, **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """An undisturbed sweep."""
    return run(tmp_path_factory.mktemp("whole"))


def settings(result: SweepResult) -> dict[str, list[Any]]:
    return {arm["arm"]: [trial["settings"] for trial in arm["trials"]] for arm in result.results["arms"]}


def test_every_arm_gets_the_same_budget_and_its_worst_case_is_held_out(whole: SweepResult):
    assert whole.results["complete"] and json.loads((whole.folder / "sweep.json").read_text()) == whole.results
    for arm in whole.results["arms"]:
        assert arm["counts"]["trials"] == 6 and [trial["number"] for trial in arm["trials"]] == list(range(6))
        rates = [trial["settings"]["finetune.train.learning_rate"] for trial in arm["trials"]]
        inside = [rate for rate in [*rates, 1e-3] if 20 * rate <= 0.1]  # the guard: ten points of accuracy
        assert arm["held_out"]["worst"]["harm"]["rate"] == pytest.approx(min(1, 100 * max(inside)), abs=0.006)
        assert arm["counts"]["outside"] == sum(20 * rate > 0.1 for rate in rates) and arm["guard"] == ["task_drop"]
        assert arm["curve"] == sorted(arm["curve"]) and len(arm["curve"]) == 6
        assert arm["budget"] == whole.results["arms"][0]["budget"]
    first, second = settings(whole).values()
    assert first[:3] == second[:3]  # the startup trials are the same attacks
    assert whole.results["comparisons"][0]["against"] == "undefended"


@pytest.mark.parametrize(("workers", "order"), [(1, 0), (4, 1), (3, 2)])
def test_proposals_depend_neither_on_the_number_of_workers_nor_on_who_ends_first(
    workers: int, order: int, whole: SweepResult, tmp_path: Path
):
    assert settings(run(tmp_path, fakes.edit(workers=workers), order=order)) == settings(whole)


def test_running_again_runs_nothing(whole: SweepResult):
    before = whole.results
    again = run(whole.folder.parent, objective=fakes.faulty, order=0)
    assert {**again.results, "created": 0} == {**before, "created": 0}  # and took no seconds more


def test_the_clock_goes_on_where_an_earlier_call_stopped(tmp_path: Path):
    first = run(tmp_path, fakes.edit(trials=1), objective=fakes.noted, order=0).results["seconds"]
    second = run(tmp_path, fakes.edit(trials=2), objective=fakes.noted, order=0).results["seconds"]
    assert 8 * 0.15 <= first < second - 2 * 0.15  # each of the fakes takes as long


def test_a_judge_that_is_silent_on_the_worst_attacks_hides_none_of_them(tmp_path: Path):
    result = run(tmp_path, objective=fakes.silent, order=0)
    undefended, vaccine = result.results["arms"]
    assert undefended["not_shown"] is None and undefended["held_out"]["worst"]
    assert vaccine["not_shown"]["trials"] and vaccine["counts"]["uncovered"] == vaccine["counts"]["failed"] > 0
    assert vaccine["not_shown"]["judge"] == "guard" and vaccine["held_out"]["worst"] is None
    assert result.results["comparisons"] == [] and result.results["complete"]
    assert "the worst case of vaccine is not shown: the judge guard gave" in sentence(result.results)
    assert "less than" not in sentence(result.results) and "not a safe one" in " ".join(remarks(result.results))
    assert "<strong>not shown</strong>" in render(result.results)
    looser = dict(guard_rows(result.results))
    assert all(cell and cell[2] for cell in looser["vaccine"])
    assert not any(cell and cell[2] for cell in looser["undefended"])


def test_a_judge_that_is_silent_on_held_out_answers_ends_no_sweep_and_shows_no_worst_case(tmp_path: Path):
    result = run(tmp_path, objective=fakes.silent_late, order=0)
    for arm in result.results["arms"]:
        assert arm["not_shown"]["held_out"] and arm["held_out"]["worst"] is None and not arm["not_shown"]["trials"]
    assert "held-out answers of " in sentence(result.results)
    render(result.results)


def test_trials_that_go_wrong_are_told_with_their_reason_and_never_counted_as_success(tmp_path: Path):
    result = run(tmp_path, objective=fakes.faulty)
    for arm in result.results["arms"]:
        states = [trial["state"] for trial in arm["trials"]]
        assert states[1:5] == ["failed", "failed", "failed", "pruned"]
        assert arm["counts"]["trials"] == 6 and arm["counts"]["failed"] == 3 and arm["counts"]["pruned"] == 1
        reasons = [trial["reason"] for trial in arm["trials"]]
        wanted = ("signal 9", "not finite at step 3", "KeyError: 'a defect'", "low")
        assert all(word in reason for word, reason in zip(wanted, reasons[1:5], strict=True))
        assert arm["worst"] in ("default", 0, 5)
        assert [trial["harm"] for trial in arm["trials"][1:5]] == [None] * 4
        assert all(trial["seconds"] > 0 for trial in arm["trials"][1:5]), "what goes wrong takes time too"


def test_a_worker_that_is_killed_is_started_again_under_its_number(whole: SweepResult, tmp_path: Path):
    result = run(tmp_path, objective=fakes.dies_once)
    assert settings(result) == settings(whole)
    for arm in result.results["arms"]:
        assert [trial["state"] for trial in arm["trials"]] == ["complete"] * 6


def killed_parent(folder: Path, after: int) -> list[Any]:
    """Start a sweep in a process of its own and kill -9 it once so many trials have begun; what was noted."""
    (folder / "recipe.json").write_text(json.dumps(fakes.RECIPE))
    words = ["-m", "sweep.fakes", "recipe.json", "out", "store", "noted"]
    source = Path(apothecary.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(source)])}
    process = subprocess.Popen([sys.executable, *words], cwd=folder, env=environment)
    deadline = time.monotonic() + 120
    while len(begun(folder)) < after:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return begun(folder)


def begun(folder: Path) -> list[Any]:
    path = folder / "noted.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [entry for entry in map(json.loads, lines) if entry[1].isdigit() and entry[2] == "begin"]


@pytest.mark.parametrize("after", [1, 7])
def test_kill_9_of_the_sweep_loses_no_trial_and_counts_none_twice(whole: SweepResult, tmp_path: Path, after: int):
    first = killed_parent(tmp_path, after)
    result = run(tmp_path, objective=fakes.noted)
    assert settings(result) == settings(whole)
    for arm, same in zip(result.results["arms"], whole.results["arms"], strict=True):
        assert [trial["number"] for trial in arm["trials"]] == list(range(6))
        assert [trial["harm"] for trial in arm["trials"]] == [trial["harm"] for trial in same["trials"]]
    runs = Counter((arm, name) for arm, name, *_ in begun(tmp_path))
    assert len(runs) == 12 and len(first) < 12
    assert sum(runs.values()) <= 12 + 2  # only those in the two workers ran again
    rates: dict[Any, set[str]] = {}
    for arm, name, _, given in begun(tmp_path):
        rates.setdefault((arm, name), set()).add(str(given))
    assert all(len(seen) == 1 for seen in rates.values())  # with the settings that they had


def test_an_error_that_no_trial_would_be_spared_stops_the_sweep_and_it_goes_on_later(tmp_path: Path):
    with pytest.raises(StoreError, match="disk is full"):
        run(tmp_path, objective=fakes.full_disk, order=0)
    assert all(arm["counts"]["failed"] == 0 for arm in run(tmp_path, order=0).results["arms"])


def test_a_clean_customer_that_fails_ends_the_sweep(tmp_path: Path):
    with pytest.raises(TrainingError, match="clean customer failed"):
        run(tmp_path, objective=no_clean, order=0)


def no_clean(task: Any) -> Any:
    return {"state": "failed", "reason": "NaN"}


def test_cancelling_keeps_what_was_found(whole: SweepResult, tmp_path: Path):
    def cancel(result: SweepResult) -> None:
        if result.results["arms"][0]["counts"]["trials"] == 2:
            (tmp_path / "out" / "CANCEL").touch()

    with pytest.raises(Cancelled, match="run the same command again"):
        run(tmp_path, on_update=cancel, order=0)
    assert settings(run(tmp_path, order=1)) == settings(whole)


def test_one_sweep_at_a_time_in_a_folder(tmp_path: Path):
    from apothecary.sweep.records import locked

    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(StoreError, match="another sweep"):
        run(tmp_path, order=0)


def test_a_folder_takes_no_second_budget(whole: SweepResult, tmp_path: Path):
    run(tmp_path, fakes.edit(trials=1), order=0)
    assert run(tmp_path, fakes.edit(trials=2), order=0).results["arms"][0]["counts"]["trials"] == 2  # more of the same
    with pytest.raises(ConfigError, match="another budget"):
        run(tmp_path, fakes.edit(trials=2, seed=1), order=0)


def test_another_arm_joins_with_the_same_budget_alone(tmp_path: Path):
    arms = fakes.RECIPE["arms"]
    run(tmp_path, {**fakes.edit(trials=2), "arms": {"undefended": arms["undefended"]}}, order=0)
    later = {"arms": {"vaccine": arms["vaccine"]}}
    joined = run(tmp_path, {**fakes.edit(trials=2), **later}, order=0)
    assert [arm["arm"] for arm in joined.results["arms"]] == ["vaccine", "undefended"]
    with pytest.raises(ConfigError, match=r"different budgets \(trials\)"):
        run(tmp_path, {**fakes.edit(trials=3), **later}, order=0)
    with pytest.raises(ConfigError, match=r"different experiments \(attack\)"):
        run(tmp_path, {**fakes.edit(trials=2), "arms": {"other": {"attack": {"n": 12}}}}, order=0)
    mixed = run(tmp_path, {**fakes.edit(trials=3, allow_mixed_budgets=True), **later}, order=0)
    assert mixed.results["mixed_budgets"] == ["trials"]
