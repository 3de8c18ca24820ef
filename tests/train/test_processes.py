"""Two gloo processes equal one.  One launch runs every case: importing costs seconds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

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
    launched = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(two)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=common | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    try:
        for case in process_cases.CASES:
            (one / case).mkdir()
            process_cases.run(case, one / case)
        for process in launched:
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in launched:
            process.kill()
    return two, one


@pytest.mark.parametrize("case", process_cases.CASES)
def test_two_processes_equal_one(folders, case):
    (two, one), (a, b) = ((load_file(folder / case / "weights.safetensors") for folder in folders),
                          (json.loads((folder / case / "record.json").read_text()) for folder in folders))  # fmt: skip
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
