"""What `curate/test_streaming.py` runs as a process of its own: the curate stage over a pool in a file."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benches import make_rows
from tiny import tiny_model, tiny_tokenizer

from apothecary.data.rows import read_rows, write_rows
from apothecary.models.load import LoadedModel
from apothecary.models.settings import ModelConfig
from apothecary.pipeline.stage import Job
from apothecary.pipeline.steps import chain, selection
from apothecary.pipeline.store import Artifact

ROWS, BALLAST = 2048, 40_000  # 80 MB, of which 512 rows may be in memory at a time
_WARM = {"max_steps": 2, "batch_size": 4, "save_every": 1}
_EPOCH = {"epochs": 1, "batch_size": 4, "save_every": 1}
# One selector for each way of going through a pool; the word after a name only tells two ways of one apart.  `loss`
# goes through it as `ifd` does at its end, `post_attack_match` by the very call of Pharmacist's mode "score".
FIELDS: dict[str, dict[str, Any]] = {
    "el2n": {"checkpoints": 1, "warmup": _WARM},
    "less": {"share": 0.01, "projection_dim": 64, "warmup": _EPOCH},
    "less_sgd": {"share": 0.01, "warmup": _EPOCH},
    "ifd": {"warmup_rows": 8, "clusters": 2, "floor": 9.0, "warmup": _WARM},  # at this floor no row is left out
    "pharmacist": {"epochs": 1, "batch_size": 64, "warmup_share": 0.01, "warmup": _EPOCH},
    "pharmacist score": {"mode": "score", "warmup_share": 0.01, "warmup": _EPOCH},
    "task_vary": {},
    "seal": {"theta": {"epochs": 1, "batch_size": 64, "save_every": 8, "reduction": "sample_mean"}},
    "dsir": {},
    "k_center": {"limit": 64},
}
AUX = ("validation", "harmful", "customer")


def write_pool(folder: Path, rows: int, ballast: int) -> Path:
    """A pool of small rows, each with `ballast` bytes that no selector reads."""
    folder.mkdir(parents=True)
    text = "x" * ballast
    write_rows(folder / "rows.jsonl", (replace(row, meta={"ballast": text}) for row in make_rows("pool", rows)))
    return folder


def curate(root: Path, method: str, pool: Path) -> dict[str, float]:
    """Run the stage in `root`/`pool's name`; the scores."""
    for role in AUX:
        (root / role).mkdir(parents=True, exist_ok=True)
        write_rows(root / role / "rows.jsonl", make_rows(role, 4))
    folder = root / "stage" / pool.name
    folder.mkdir(parents=True, exist_ok=True)
    config = {"kind": "curate", "method": method.split()[0], "fields": FIELDS[method], "keep": 0.5, "seed": 0}
    aux = {f"aux.{role}": Artifact(root / role) for role in AUX}
    with patch.object(chain, "load", _tiny):
        selection.curate(Job(config, {"rows": Artifact(pool), **aux}, folder))
    return json.loads((folder / "scores.json").read_text())


def _tiny(job: Job, aligned: bool = True) -> LoadedModel:
    return LoadedModel(tiny_model(), tiny_tokenizer(), ModelConfig())  # type: ignore[arg-type]


def peak() -> int:
    """The largest resident memory so far, in bytes; a new measurement begins."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    Path("/proc/self/clear_refs").write_text("5")
    return found


def main(root: Path, method: str) -> None:
    """Peaks of the stage over small rows, over large rows, and over large rows that are all held in memory."""
    small, large = write_pool(root / "small", ROWS, 0), write_pool(root / "large", ROWS, BALLAST)
    found = {"file": (large / "rows.jsonl").stat().st_size}
    for name, pool in (("small", small), ("large", large), ("held", large)):
        if name == "held":
            selection.RowFile = read_rows  # type: ignore
        peak()
        curate(root / name, method, pool)
        found[name] = peak()
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 3:
        curate(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    else:
        main(Path(sys.argv[1]), sys.argv[2])
