"""Stages and their executor: keys, caching, kills, two processes, cancellation."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from pipeline import fakes
from pipeline.test_store import ENVIRONMENT, FAKES

from apothecary.pipeline import fingerprint
from apothecary.pipeline.stage import Cancelled, Executor, Stage
from apothecary.pipeline.store import Store

PAUSE = fakes.PAUSE


def test_the_key_follows_everything_that_decides_the_result(monkeypatch: pytest.MonkeyPatch):
    stage = fakes.chain()
    assert stage.key == fakes.chain().key == replace(stage, label="another name").key
    others = [
        replace(stage, kind="finetune"),
        replace(stage, config={**stage.config, "bias": 1}),
        replace(stage, inputs={"numbers": fakes.chain(n=9).inputs["numbers"]}),
        replace(stage, leaves={"weights": "abc"}),
        replace(stage, modules=("apothecary.stats",)),
    ]
    keys = {stage.key, *(other.key for other in others)}
    assert len(keys) == 6
    monkeypatch.setattr(fingerprint, "versions", lambda: {"torch": "0"})
    assert fakes.chain().key not in keys


def test_a_second_run_does_no_work(tmp_path: Path):
    first = Executor(Store(tmp_path))
    digest = first.execute(fakes.chain(links=2)).digest
    assert [record.cached for record in first.records.values()] == [False, False, False]
    calls = []
    again = Executor(Store(tmp_path), emit=lambda event, label, detail: calls.append((event, label)))
    assert again.execute(fakes.chain(links=2)).digest == digest
    assert calls == [("cached", "train 1")]


def test_an_altered_input_of_a_cached_stage_is_found(tmp_path: Path):
    stage = fakes.chain()
    Executor(Store(tmp_path)).execute(stage)
    source = stage.inputs["numbers"]
    (Store(tmp_path).folder("data", source.key) / "numbers.json").write_text("[]")
    with pytest.raises(Exception, match=r"numbers\.json was altered"):
        Executor(Store(tmp_path)).execute(fakes.chain())


def test_a_deleted_input_of_a_cached_stage_is_not_made_again(tmp_path: Path):
    store, stage = Store(tmp_path), fakes.chain(links=2)
    Executor(store).execute(stage)
    before = store.folder("align", stage.inputs["before"].key)
    before.rename(tmp_path / "gone")
    again = Executor(store)
    again.execute(fakes.chain(links=2))
    assert [(record.stage.label, record.cached) for record in again.records.values()] == [("train 1", True)]
    assert not before.exists()


def test_an_input_that_came_out_differently_makes_the_rest_stale(tmp_path: Path):
    """On a GPU a stage that is made anew may differ; what stands on the old one is then made anew, too."""
    store, stage = Store(tmp_path), fakes.chain()
    old = Executor(store).execute(stage).digest
    source = stage.inputs["numbers"]
    store.folder("data", source.key).rename(tmp_path / "gone")
    Executor(store).execute(replace(source, run=fakes.numbers))
    assert Executor(store).state(fakes.chain()) == "fresh"  # the same content again
    store.set_aside("data", source.key)
    draft = store.draft("data", source.key)
    (draft / "numbers.json").write_text("[5, 5]")
    store.commit("data", source.key, {"inputs": {}, "metrics": {}})
    executor = Executor(store)
    assert executor.state(stage) == "stale"
    new = executor.execute(stage)
    assert new.digest != old and json.loads(new.path("weights/model.json").read_text()) == 20
    assert store.folder("align", stage.key).with_suffix(".stale").is_dir()
    assert store.manifests("align") == [new.manifest]


def test_killed_again_and_again_it_ends_with_the_same_content(tmp_path: Path):
    """Kills by turns at a random moment and right after a checkpoint of a stage at work."""
    whole = Executor(Store(tmp_path / "whole")).execute(fakes.chain(pause=PAUSE, links=3))
    chance, kills, within, out = random.Random(0), 0, 0, ""
    while not out:
        process = subprocess.Popen([sys.executable, FAKES, tmp_path / "killed", "chain"], env=ENVIRONMENT,
                                   stdout=subprocess.PIPE, text=True)  # fmt: skip
        assert process.stdout and process.stdout.readline().startswith("ready")
        if kills < 6:
            if kills % 2:
                time.sleep(chance.random() * PAUSE * 8)
            else:
                wait_for_progress(process, tmp_path / "killed")
            process.send_signal(signal.SIGKILL)
        out, _ = process.communicate()
        kills += process.returncode == -signal.SIGKILL
        within += bool(checkpoints(tmp_path / "killed"))
    final = Executor(Store(tmp_path / "killed")).execute(fakes.chain(pause=PAUSE, links=3)).verify()
    assert out.split()[0] == final.digest == whole.digest and final.key == whole.key
    resumed = any(manifest["metrics"]["resumed"] for manifest in Store(tmp_path / "killed").manifests("align"))
    assert kills >= 3 and within and resumed
    assert not list(tmp_path.glob("killed/*/*.partial"))


def checkpoints(root: Path) -> dict[Path, int]:
    """When each stage at work wrote its last checkpoint."""
    found = root.glob("*/*.partial/checkpoints/last")
    return {path: path.stat().st_mtime_ns for path in found}


def wait_for_progress(process: subprocess.Popen, root: Path) -> None:
    before = checkpoints(root)
    while process.poll() is None and checkpoints(root) in ({}, before):
        time.sleep(0.005)


def test_two_processes_do_the_work_once(tmp_path: Path):
    command = [sys.executable, FAKES, tmp_path, "chain"]
    both = [subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outs = {process.communicate(timeout=60)[0] for process in both}
    assert len(outs) == 1 and all(process.returncode == 0 for process in both)
    events = [line for path in tmp_path.glob("*/*/events.jsonl") for line in path.read_text().splitlines()]
    assert sum('"started"' in line for line in events) == 4


def test_waiting_for_a_lock_can_be_cancelled(tmp_path: Path):
    stage, events = fakes.chain().inputs["numbers"], []

    def check() -> None:
        if ("waiting", "numbers") in events:
            raise Cancelled("stop")

    with Store(tmp_path).lock("data", stage.key), pytest.raises(Cancelled):
        waiting = Executor(Store(tmp_path), check, lambda event, label, _: events.append((event, label)))
        waiting.execute(stage)
    assert Executor(Store(tmp_path)).execute(stage).digest


def test_cancelling_between_steps_keeps_the_steps(tmp_path: Path):
    calls = []

    def check() -> None:
        calls.append(time.monotonic())
        if len(calls) == 5:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        Executor(Store(tmp_path), check).execute(fakes.chain())
    (partial,) = tmp_path.glob("align/*.partial")
    events = [json.loads(line)["event"] for line in (partial / "events.jsonl").read_text().splitlines()]
    assert events == ["started", "cancelled"]
    artifact = Executor(Store(tmp_path)).execute(fakes.chain())
    assert artifact.manifest["metrics"]["resumed"] == 2
    events = [json.loads(line)["event"] for line in (artifact.folder / "events.jsonl").read_text().splitlines()]
    assert events == ["started", "cancelled", "started", "finished"]


def test_a_failing_stage_is_not_promoted_and_says_so(tmp_path: Path):
    stage = Stage(
        "align", "broken", fakes.train, {"bias": "x", "pause": 0}, {"numbers": fakes.chain().inputs["numbers"]}
    )
    with pytest.raises(TypeError):
        Executor(Store(tmp_path)).execute(stage)
    (partial,) = tmp_path.glob("align/*.partial")
    assert '"failed"' in (partial / "events.jsonl").read_text()
    assert Store(tmp_path).find("align", stage.key) is None
