"""Where trials run: limits, threads, workers whose parent dies, and Ray through a stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
from sweep import fakes

import apothecary
from apothecary.errors import ConfigError
from apothecary.sweep import SweepRecipe, launch
from apothecary.sweep.launch import Local
from apothecary.sweep.ray_launch import Ray
from apothecary.sweep.trial import Task

launch.WARM = ("sweep.fakes",)


def task(folder: Path, name: str = "0", threads: int = 1) -> Task:
    return Task("arm", name, {}, folder / "store", folder / name, "HS", 0.95, threads=threads)


def ended(local: Any) -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for found in local.wait():
            return found
    raise AssertionError("no worker ended")


@pytest.mark.parametrize(
    ("limits", "wanted"), [({"minutes": 1e-4}, "longer than 0.0001 minutes"), ({"memory_mb": 1.0}, "MB of memory")]
)
def test_a_trial_beyond_a_limit_is_ended_with_the_reason_and_not_tried_again(
    limits: dict[str, float], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "POLL", 0.05)
    local = Local(fakes.endless, "forkserver", **limits)
    local.start(task(tmp_path))
    (running,) = local.running
    _, found, reason = ended(local)
    assert found["state"] == "failed" and wanted in found["reason"] and reason == ""
    assert not running.process.is_alive() and not local.running


def test_workers_have_their_threads_and_are_other_processes(tmp_path: Path):
    local = Local(fakes.environment, "forkserver")
    local.start(task(tmp_path))
    _, found, _ = ended(local)
    assert found["threads"] == "1" and found["pid"] != os.getpid()


def test_a_defect_is_told_with_its_traceback_in_the_log(tmp_path: Path):
    local = Local(fakes.faulty, "forkserver")
    local.start(task(tmp_path, "3"))
    _, found, _ = ended(local)
    assert found == {"state": "failed", "reason": "KeyError: 'a defect'"}
    assert "Traceback" in (tmp_path / "3" / launch.LOG).read_text()


SCRIPT = """
import sys, time
from pathlib import Path
from sweep import fakes
from sweep.test_launch import task
from apothecary.sweep.launch import Local

if __name__ == "__main__":
    local = Local(fakes.endless, "forkserver")
    local.start(task(Path(sys.argv[1])))
    print(local.running[0].process.pid, flush=True)
    time.sleep(600)
"""


def test_a_worker_ends_when_its_parent_is_killed(tmp_path: Path):
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = [str(Path(__file__).parents[1]), str(Path(apothecary.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    words = [sys.executable, "script.py", str(tmp_path)]
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert not psutil.wait_procs([worker], timeout=30)[1]


@pytest.mark.parametrize(("device", "gpu", "wanted"), [("cpu", True, "forkserver"), ("auto", False, "forkserver"),
                                                      ("auto", True, "spawn"), ("cuda", False, "spawn")])  # fmt: skip
def test_where_there_is_a_gpu_nothing_is_forked(device: str, gpu: bool, wanted: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "exists", lambda path: gpu)
    assert launch.local(fakes.plain, device, None, None).context.get_start_method() == wanted


# -- Ray -------------------------------------------------------------------------------------------------------------


class Died(Exception):
    pass


def fake_ray() -> Any:
    """As much of Ray as is used: tasks run when they are waited for; options are kept."""
    ray: Any = ModuleType("ray")
    ray.options, ray.cancelled = [], []
    ray.is_initialized, ray.init = lambda: False, lambda **options: ray.options.append(("init", options))

    def remote(**options: Any) -> Any:
        ray.options.append(("remote", options))

        def made(work: Any) -> Any:
            def with_options(**more: Any) -> Any:
                ray.options.append(("task", more))
                return SimpleNamespace(remote=lambda task: (work, task))

            return SimpleNamespace(options=with_options)

        return made

    def get(reference: Any) -> Any:
        work, given = reference
        if given.name == "7":
            raise Died
        return work(given)

    ray.remote, ray.get = remote, get
    ray.wait = lambda references, timeout: (references[:1], references[1:])
    ray.cancel = lambda reference, force: ray.cancelled.append((reference[1].name, force))
    return ray


def test_trials_on_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ray = fake_ray()
    monkeypatch.setitem(sys.modules, "ray", ray)
    launcher = Ray(fakes.faulty, gpus=1.0)
    for name in ("2", "3", "7", "9"):
        launcher.start(task(tmp_path, name, threads=2))
    found = [next(iter(launcher.wait())) for _ in range(3)]
    assert [(each[0].name, each[1] and each[1]["state"]) for each in found] == [("2", "failed"), ("3", "failed"),
                                                                               ("7", None)]  # fmt: skip
    assert found[1][1]["reason"] == "KeyError: 'a defect'" and "Died" in found[2][2]
    launcher.stop()
    assert ray.cancelled == [("9", True)] and not launcher.running
    # the sweep decides what is tried again, and no process has two trials
    assert ("remote", {"max_retries": 0, "max_calls": 1, "num_gpus": 1.0}) in ray.options
    assert (
        ray.options[-1][1]["num_cpus"] == 2 and ray.options[-1][1]["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "2"
    )


@pytest.mark.parametrize("limit", [{"trial_minutes": 5}, {"trial_memory_mb": 100}])
def test_limits_that_ray_would_not_keep_are_refused(limit: dict[str, Any]):
    with pytest.raises(ConfigError, match=f"{next(iter(limit))} is .* ray launcher keeps no such limit"):
        SweepRecipe.parse(fakes.edit(launcher="ray", **limit))


def test_ray_must_be_told_the_device():
    with pytest.raises(ConfigError, match=r"model\.device is auto"):
        SweepRecipe.parse(fakes.edit(launcher="ray"))
    assert SweepRecipe.parse({**fakes.edit(launcher="ray"), "model": {"path": "lab", "device": "cpu"}})


def test_without_ray_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'apothecary\[ray\]'"):
        Ray(fakes.plain)
