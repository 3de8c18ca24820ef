"""Selectors over a pool that is larger than the memory they may take, and killed in the middle of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import streaming_cases as cases

from apothecary.data.rows import read_rows

SCRIPT = Path(cases.__file__)


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure the peak")
@pytest.mark.parametrize("method", [name for name in cases.FIELDS if name != "less_sgd"])  # it is killed below
def test_the_pool_need_not_fit_in_memory(tmp_path, method):
    """Against the same rows without their ballast, the stage may take half of the ballast's size at most."""
    with start(tmp_path, method) as process:
        found = json.loads(process.communicate()[0])
    assert found["file"] > 80e6
    assert found["large"] - found["small"] < 0.5 * found["file"]
    assert found["held"] - found["small"] > 0.9 * found["file"], "a pool in memory would have been seen"
    small, large = (read_rows(tmp_path / name / "stage" / name / "rows.jsonl") for name in ("small", "large"))
    assert [row.id for row in small] == [row.id for row in large] and len(small) == cases.ROWS // 2


@pytest.mark.parametrize(("method", "sign"), [("less_sgd", "sweep/*/512-*"), ("pharmacist", "row_weights.pt"),
                                              ("pharmacist score", "sweep/*/512-*"), ("ifd", "sweep/scores/512-*"),
                                              ("task_vary", "sweep/pool/512-*"),
                                              ("seal", "checkpoint-8/*")])  # fmt: skip
def test_killed_in_the_middle_it_goes_on_where_it_was(tmp_path, method, sign):
    """Killed as soon as there is a sign that it is under way."""
    pool = cases.write_pool(tmp_path / "pool", 2048, 0)
    whole = cases.curate(tmp_path / "whole", method, pool)
    folder = tmp_path / "killed" / "stage" / "pool" / "checkpoints"
    with start(tmp_path / "killed", method, pool) as process:
        while process.poll() is None and not list(folder.glob(sign)):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it was killed before its end"
    done = {path: path.stat().st_mtime_ns for path in folder.glob("sweep/*/*-*")}
    assert cases.curate(tmp_path / "killed", method, pool) == whole
    assert {path: path.stat().st_mtime_ns for path in done} == done, "finished chunks were not made again"
