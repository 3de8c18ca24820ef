"""Two gloo processes equal one.  One launch runs every case: importing costs seconds."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import cases
import process_cases
import pytest
from benches import furthest
from safetensors.torch import load_file

SCRIPT = Path(process_cases.__file__)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(two processes, one process): folders with the results of every case."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                           "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    logs = [two / f"rank-{rank}.log" for rank in (0, 1)]
    launched = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, str(SCRIPT), str(two)]
            launched.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
    try:
        for name in process_cases.ALL:
            (one / name).mkdir()
            process_cases.run(name, one / name)
        for process in launched:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=240)
    finally:
        codes = [process.poll() for process in launched]
        for process in launched:
            process.kill()
    assert codes == [0, 0], "\n".join(f"{log.name}: {log.read_text()[-3000:]}" for log in logs)
    return two, one


@pytest.mark.parametrize("case", [*cases.params("two_processes"), *process_cases.EXTRA])
def test_two_processes_equal_one(folders, request, case):
    name = request.node.callspec.id
    (two, one), (a, b) = ((load_file(folder / name / "weights.safetensors") for folder in folders),
                          (json.loads((folder / name / "record.json").read_text()) for folder in folders))  # fmt: skip
    assert furthest(two, one) < 1e-9
    assert len(a["logged"]) == len(b["logged"]) > 0
    for mine, other in zip(a["logged"], b["logged"], strict=True):
        assert mine == pytest.approx(other, rel=1e-9), "logged values are those of the whole step"
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-9)


def test_convergence_is_judged_on_the_whole_step(folders):
    for folder in folders:
        steps = json.loads((folder / "converged" / "record.json").read_text())["logged"]
        assert 10 <= len(steps) < 30


def test_a_method_for_one_process_is_refused(folders):
    for rank in "01":
        sentence = (folders[0] / f"refused-{rank}.txt").read_text()
        assert sentence == "method 'alone' cannot run in layout 'data_parallel'; launch it as single"
    assert not (folders[0] / "refused").exists(), "before any work"
